"""Which ways of computing the tests of this session really took, written down where the numbers are made.

What a child process computed (servers, ranks started by torchrun) is not seen. Trials that only choose a route do not count.
"""

from __future__ import annotations

import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

HEAD, KERNEL, ATTENTION, VLLM_HEAD, BF16 = (
    "head routes", "head kernel", "attention", "vLLM's tied bf16 head", "bf16 products",
)  # fmt: skip
POSSIBLE = {
    ATTENTION: ("eager", "sdpa", "rlalign_sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"),
    VLLM_HEAD: ("packed", "read where it lies"),
    BF16: ("native", "widened"),
}  # of HEAD and KERNEL the code itself knows
taken: defaultdict[str, set[str]] = defaultdict(set)
_trying = 0


def took(what: str, how: str) -> None:
    """Write down that a test went this way."""
    if not _trying:
        taken[what].add(how)


def watch() -> None:
    """Write down every head product from here on. To be called before anything imports them by name."""
    from rlalign.head import kernel, products, routes

    products.matmul = _watched(products.matmul, lambda a, b, route, **rest: took(HEAD, str(route)))
    kernel.Kernel.__call__ = _watched(kernel.Kernel.__call__, lambda self, *rest: took(KERNEL, self.path))
    for name in ("cpu_route", "decode_kernel", "bits"):
        setattr(routes, name, _trial(getattr(routes, name)))


def watch_attention() -> None:
    """The same for transformers' attention, once something has imported it: it asks for the function at every forward."""
    module = sys.modules.get("transformers.modeling_utils")
    interface = getattr(module, "AttentionInterface", None)
    if interface is None or hasattr(interface.get_interface, "__wrapped__"):
        return
    interface.get_interface = _watched(interface.get_interface, _asked)


def _asked(self: object, attn_implementation: str | None, default: Callable) -> None:
    took(ATTENTION, attn_implementation or "eager")


def summary(found: dict[str, Iterable[str]]) -> Iterator[str]:
    """One line per kind: what ran, and what exists but did not."""
    from rlalign.head.kernel import PATHS
    from rlalign.head.products import Route

    possible = POSSIBLE | {HEAD: tuple(map(str, Route)), KERNEL: tuple(PATHS)}
    for what, every in possible.items():
        ran = set(found.get(what, ()))
        missing = [how for how in every if how not in ran]
        yield f"{what}: {', '.join(sorted(ran)) or 'none'}" + (f"; not here: {', '.join(missing)}" if missing else "")


def of_this_process() -> dict[str, list[str]]:
    """What was written down, and how bf16 products were settled, as plain data."""
    for choice in getattr(sys.modules.get("rlalign.head.widened"), "_choices", {}).values():
        took(BF16, choice.products)
    return {what: sorted(hows) for what, hows in taken.items()}


def _watched(function: Callable, note: Callable) -> Callable:
    @functools.wraps(function)
    def watched(*arguments: object, **options: object) -> object:
        note(*arguments, **options)
        return function(*arguments, **options)

    return watched


def _trial(function: Callable) -> Callable:
    @functools.wraps(function)
    def trial(*arguments: object, **options: object) -> object:
        global _trying
        _trying += 1
        try:
            return function(*arguments, **options)
        finally:
            _trying -= 1

    return trial
