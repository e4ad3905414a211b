"""The trainer's model with every matching point visible and replaceable, through forward hooks and the attention registry.

Suffixes: B sequences, L padded length, D features.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlalign.diagnose.attribution.mapping import Pair
from rlalign.rollout.worker.recording import Tap

# Given a point and its value [B, L, D], returns what the model shall go on with, or None for the value itself.
Visitor = Callable[[str, Tensor], Tensor | None]


@contextmanager
def visited(network: nn.Module, pairs: Sequence[Pair], shape: tuple[int, int], visitor: Visitor) -> Iterator[None]:
    """Call `visitor` at every point of every forward inside. shape: (B, L) of the batches.

    Raises ValueError where the model's attention cannot be seen: it then must be run with the sdpa or eager implementation.
    """
    with ExitStack() as stack:
        attention: dict[nn.Module, dict[int, str]] = {}
        for tap in (pair.trainer for pair in pairs):
            module = network.get_submodule(tap.module)
            if tap.side == "attention":
                attention.setdefault(module, {})[tap.index] = tap.point
            else:
                stack.callback(_hook(module, tap, shape, visitor).remove)
        if attention:
            stack.enter_context(_attention_visited(network, attention, shape, visitor))
        yield


def _hook(module: nn.Module, tap: Tap, shape: tuple[int, int], visitor: Visitor) -> RemovableHandle:
    def before(module: nn.Module, args: tuple, kwargs: dict[str, object]) -> tuple[tuple, dict[str, object]] | None:
        if args:
            changed = _visit(visitor, tap.point, args[tap.index], shape)
            return ((*args[: tap.index], changed, *args[tap.index + 1 :]), kwargs)
        name = list(kwargs)[tap.index]
        return args, kwargs | {name: _visit(visitor, tap.point, kwargs[name], shape)}

    def after(module: nn.Module, args: tuple, output: object) -> object:
        if isinstance(output, Tensor):
            return _visit(visitor, tap.point, output, shape)
        changed = _visit(visitor, tap.point, output[tap.index], shape)
        return type(output)((*output[: tap.index], changed, *output[tap.index + 1 :]))

    if tap.side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def _visit(visitor: Visitor, point: str, value: Tensor, shape: tuple[int, int]) -> Tensor:
    """value: [B, L, D], [B * L, D] or [B, L, heads, D], as the model has it."""
    changed = visitor(point, value.reshape(*shape, -1))
    return value if changed is None else changed.to(value.dtype).reshape(value.shape)


@contextmanager
def _attention_visited(
    network: nn.Module, points: dict[nn.Module, dict[int, str]], shape: tuple[int, int], visitor: Visitor
) -> Iterator[None]:
    """Put a function of ours in the place of the model's attention function: queries and keys after rope have no module."""
    name = network.config._attn_implementation
    if name not in ("sdpa", "eager") and name not in ALL_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"the trainer's attention implementation {name!r} cannot be seen; load the model with sdpa or eager"
        )
    known = ALL_ATTENTION_FUNCTIONS.get(name)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: object
    ) -> tuple:
        own = known or sys.modules[type(module).__module__].eager_attention_forward
        heads = [query, key, value]
        for index, point in points.get(module, {}).items():
            by_token = heads[index].transpose(1, 2)  # [B, L, heads, D]
            heads[index] = _visit(visitor, point, by_token, shape).transpose(1, 2)
        return own(module, *heads, mask, **options)

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield
    finally:
        if known is None:
            del ALL_ATTENTION_FUNCTIONS[name]
        else:
            ALL_ATTENTION_FUNCTIONS[name] = known


def module_names(network: nn.Module) -> dict[str, str]:
    """{name: class} of the trainer's modules."""
    return {name: type(module).__qualname__ for name, module in network.named_modules()}
