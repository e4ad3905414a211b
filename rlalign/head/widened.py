"""16-bit matrix products on a CPU that has no instructions for them: widened to float32, multiplied, rounded once.

torch computes bf16 and float16 products there element by element, 4 to 200 times slower than a float32 product. Widening is exact,
so that what comes out is what instructions for 16 bits would give, up to the order of float32 additions. Where a measurement
says so, this module takes the place of torch's CPU kernels of products and attention, in this process: everything that reaches
them computes so, forward and backward, in our networks, in remote code, under peft, DeepSpeed, checkpointing and vLLM.
"""

from __future__ import annotations

import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from rlalign import ranks
from rlalign.head import kernel as head_kernel

logger = logging.getLogger(__name__)

VARIABLE = "RLALIGN_CPU_PRODUCTS"  # native | widened: instead of a measurement
NATIVE, WIDENED = "native", "widened"
FACTOR = 2.0  # torch's own are kept unless they take this many times as long; seen: below 1.3 with instructions, above 4 without
ROWS, SIZE, TRIES = 64, 256, 5  # of the product that is measured: [64, 256] by [256, 256], and its two gradients
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@dataclass(frozen=True, slots=True)
class Choice:
    """How products of one dtype are computed in this process.

    why: measured, or what decided instead. native_ms, widened_ms: of the measured products; None where nothing was measured.
    host: processor and torch, for which it holds.
    """

    dtype: str
    products: str
    why: str
    native_ms: float | None
    widened_ms: float | None
    host: str

    def describe(self) -> str:
        """One line for people."""
        times = ""
        if self.native_ms is not None:
            times = f"; torch's own took {self.native_ms:.2f} ms, widened to float32 {self.widened_ms:.2f} ms"
        return f"{self.dtype} products on {self.host}: {self.products} ({self.why}{times})"


_choices: dict[torch.dtype, Choice] = {}
_widened: set[torch.dtype] = set()
_library: list[torch.library.Library] = []  # what holds our kernels in place


def decide(dtype: torch.dtype) -> Choice | None:
    """How this process computes CPU products of this dtype; settled by the first call. None for any but the 16-bit ones.

    Raises ValueError for a RLALIGN_CPU_PRODUCTS that is neither native nor widened.
    """
    if dtype not in SIXTEEN_BITS:
        return None
    if dtype not in _choices:
        forced = os.environ.get(VARIABLE, "")
        if forced not in ("", NATIVE, WIDENED):
            raise ValueError(f"{VARIABLE}={forced!r}: choose {NATIVE} or {WIDENED}, or leave it unset to measure")
        name = str(dtype).removeprefix("torch.")
        if forced:
            choice = Choice(name, forced, VARIABLE, None, None, host())
        else:
            native_ms, widened_ms = _measured(dtype)
            found = WIDENED if native_ms > FACTOR * widened_ms else NATIVE
            choice = Choice(name, found, "measured", round(native_ms, 3), round(widened_ms, 3), host())
        _settle(dtype, choice)
        logger.log(logging.WARNING if choice.products == WIDENED else logging.INFO, choice.describe())
    return _choices[dtype]


def decide_for(module: torch.nn.Module) -> Choice | None:
    """`decide` for the dtype of a network; None where it is not on the CPU."""
    parameter = next(module.parameters(), None)
    return None if parameter is None or parameter.device.type != "cpu" else decide(parameter.dtype)


def decide_together(dtype: torch.dtype) -> Choice | None:
    """`decide` with one answer on all ranks: widened where one of them needs it. Every rank must call it."""
    choice = decide(dtype)
    if choice is None or ranks.world_size() == 1:
        return choice
    if ranks.any_of(choice.products == WIDENED, torch.device("cpu")) and choice.products == NATIVE:
        _settle(dtype, replace(choice, products=WIDENED, why="another rank needs it"))
    return _choices[dtype]


def state() -> list[dict[str, object]]:
    """Every choice made so far, for a checkpoint and for the run's summary."""
    return [asdict(choice) for choice in _choices.values()]


def resume(saved: Sequence[Mapping[str, object]]) -> None:
    """Take a checkpoint's choices (`state`), so that a resumed run has the bits of one that never stopped.

    Not on another host, whose bits differ anyway and where a choice may be slow, and not against RLALIGN_CPU_PRODUCTS.
    """
    for kept in saved:
        dtype = getattr(torch, kept["dtype"])
        now = decide(dtype)
        if now.host == kept["host"] and now.why != VARIABLE and now.products != kept["products"]:
            _settle(dtype, replace(now, products=kept["products"], why="as in the checkpoint"))


def environment() -> dict[str, str]:
    """For a process of this one's model: the choice for bf16, so that both compute alike. Empty where none was made."""
    choice = _choices.get(torch.bfloat16)
    return {} if choice is None else {VARIABLE: choice.products}


def is_widened(dtype: torch.dtype) -> bool:
    """True where CPU products of this dtype are widened now."""
    return dtype in _widened


@contextmanager
def using(products: str, *dtypes: torch.dtype) -> Iterator[None]:
    """Inside, products of these dtypes (both by default) are native or widened, whatever was chosen."""
    before = set(_widened)
    for dtype in dtypes or SIXTEEN_BITS:
        _switch(dtype, products)
    try:
        yield
    finally:
        _widened.clear()
        _widened.update(before)


@lru_cache(maxsize=1)
def host() -> str:
    """Processor, its instructions as torch uses them, torch's version."""
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__})"


def _settle(dtype: torch.dtype, choice: Choice) -> None:
    _choices[dtype] = choice
    _switch(dtype, choice.products)


def _switch(dtype: torch.dtype, products: str) -> None:
    if products == NATIVE:
        _widened.discard(dtype)
        return
    if not _library:
        _install()
    _widened.add(dtype)


def _measured(dtype: torch.dtype) -> tuple[float, float]:
    """Milliseconds of a product and its two gradients: torch's own, and widened. The fastest of a few of each, in turn.

    On one thread, in its own processor time: on a busy host several threads wait for each other, and the ratio is then any. The
    thread is a new one, so that the threads of this process, which an engine may have bound to cores, stay as they are.
    """
    with ThreadPoolExecutor(1) as other:
        return other.submit(_timed, dtype).result()


def _timed(dtype: torch.dtype) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    input_NK, grad_NM, weight_MK = (
        torch.randn(rows, SIZE, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        for rows in (ROWS, ROWS, SIZE)
    )
    pairs = ((input_NK, weight_MK.t()), (grad_NM, weight_MK), (grad_NM.t(), input_NK))
    times: tuple[list[float], list[float]] = ([], [])
    threads = torch.get_num_threads()
    torch._C.set_num_threads(1)  # torch's own name for it does nothing after vLLM's CPU worker has started
    try:
        with torch.inference_mode(), using(NATIVE, dtype):
            for _ in range(TRIES):
                for (a, b), found in ((pair, times) for pair in pairs):
                    start = time.thread_time()
                    torch.mm(a, b)
                    middle = time.thread_time()
                    torch.mm(a.float(), b.float()).to(dtype)
                    found[0].append(middle - start)
                    found[1].append(time.thread_time() - middle)
    finally:
        torch._C.set_num_threads(threads)
    native, widened = (1e3 * sum(min(of_way[i :: len(pairs)]) for i in range(len(pairs))) for of_way in times)
    return native, widened


def _install() -> None:
    """Put our kernels where torch's were. They pass on whatever is not widened, with 3 microseconds of their own a call."""
    library = torch.library.Library("aten", "IMPL")
    kernels: dict[str, Callable] = dict.fromkeys(PRODUCTS, _product)
    kernels |= {f"{name}.out": _product_into for name in PRODUCTS}
    kernels |= {"mm": _mm, "addmm": _addmm, ATTENTION: _attention, f"{ATTENTION}_backward": _attention_gradient}
    originals = {name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in kernels}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is replaced is what is wanted
        for name, ours in kernels.items():
            functional = originals[name.removesuffix(".out")]
            library.impl(name, partial(ours, functional, originals[name]), "CPU", with_keyset=True)
    _library.append(library)


def _mm(functional: Kernel, own: Kernel, keys: Keys, a_NK: Tensor, b_KM: Tensor) -> Tensor:
    product_NM = _lying_product(a_NK, b_KM)
    return _product(functional, own, keys, a_NK, b_KM) if product_NM is None else product_NM.to(a_NK.dtype)


def _addmm(
    functional: Kernel, own: Kernel, keys: Keys, bias_M: Tensor, a_NK: Tensor, b_KM: Tensor, **options: object
) -> Tensor:
    product_NM = _lying_product(a_NK, b_KM) if bias_M.dtype == a_NK.dtype and not options else None
    if product_NM is None:
        return _product(functional, own, keys, bias_M, a_NK, b_KM, **options)
    return product_NM.add_(bias_M.float()).to(a_NK.dtype)


def _lying_product(a_NK: Tensor, b_KM: Tensor) -> Tensor | None:
    """The float32 product of a linear layer, x @ weight.T in bf16, by the compiled kernel that reads the weight as it lies.

    None for other operands, and where no kernel is built: those are widened. Its bits do not depend on the number of rows.
    """
    if torch.bfloat16 not in _widened or not (a_NK.dtype == b_KM.dtype == torch.bfloat16):
        return None
    if b_KM.stride(0) != 1 or b_KM.stride(1) < b_KM.shape[0]:
        return None
    kernel = head_kernel.fma()
    if kernel is None or a_NK.stride(1) != 1 or not a_NK.numel() or not b_KM.numel():
        return None
    return kernel(a_NK, b_KM.t(), torch.empty(a_NK.shape[0], b_KM.shape[1], dtype=torch.float32, device="cpu"))


def _product(_: Kernel, own: Kernel, keys: Keys, *tensors: Tensor, **options: object) -> Tensor:
    dtype = tensors[0].dtype
    if dtype not in _widened or any(x.dtype != dtype for x in tensors):  # of mixed ones torch has its own errors
        return own.call_boxed(keys, *tensors, **options)
    return own.call_boxed(keys, *[x.float() for x in tensors], **options).to(dtype)


def _product_into(
    functional: Kernel, own: Kernel, keys: Keys, *tensors: Tensor, out: Tensor, **options: object
) -> Tensor:
    dtype = out.dtype
    if dtype not in _widened or any(x.dtype != dtype for x in tensors):
        return own.call_boxed(keys, *tensors, out=out, **options)
    result = functional.call_boxed(keys, *[x.float() for x in tensors], **options)
    if out.shape != result.shape:
        out.resize_(result.shape)
    return out.copy_(result)


def _attention(
    _: Kernel,
    own: Kernel,
    keys: Keys,
    query: Tensor,
    *rest: object,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores, weights and sums in float32; [B, H, L, E] rounded once. The second output, logsumexp, is float32 as it always is."""
    if query.dtype not in _widened:
        return own.call_boxed(keys, query, *rest, attn_mask=attn_mask, scale=scale)
    found, logsumexp = own.call_boxed(keys, query.float(), *_wide(rest), attn_mask=_wide([attn_mask])[0], scale=scale)
    return found.to(query.dtype), logsumexp


def _attention_gradient(
    _: Kernel,
    own: Kernel,
    keys: Keys,
    grad: Tensor,
    *rest: object,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if grad.dtype not in _widened:
        return own.call_boxed(keys, grad, *rest, attn_mask=attn_mask, scale=scale)
    found = own.call_boxed(keys, grad.float(), *_wide(rest), attn_mask=_wide([attn_mask])[0], scale=scale)
    return tuple(x.to(grad.dtype) for x in found)


def _wide(given: list[object] | tuple[object, ...]) -> list[object]:
    return [x.float() if isinstance(x, Tensor) and x.dtype in SIXTEEN_BITS else x for x in given]


Kernel = torch._C._SafeKernelFunction
Keys = torch._C.DispatchKeySet
