"""Steady engines: on CPU, vLLM's bf16 linear layers add in one order, whatever the number of rows in a step.

vLLM (0.32) multiplies small weights by a packed kernel with AMX tiles and large ones by oneDNN. The first has another order for up
to 4 rows, the second for 64 to about 1,000; so the same token has other bits prefilled than decoded, and in a batch of another
size. In an engine that is built steady every layer takes the packed kernel, up to 4 rows padded to 5: one chain per output, the
order of `rlalign.head.steady`. Where products are widened (no instructions for bf16) they keep to one order already.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlalign.head import steady, widened

VARIABLE = "RLALIGN_STEADY"
MARK = "rlalign_steady"  # of a layer, so that a reload packs it again in the same way
FEWEST = 5  # rows from which the packed kernel uses tiles


def enabled() -> bool:
    """True while engines are to be built steady."""
    return os.environ.get(VARIABLE) == "1"


@contextmanager
def building_steady(wanted: bool) -> Iterator[None]:
    """Engines built inside are steady, or vLLM's own, whatever the environment says; afterwards it says what it said.

    Raises RuntimeError on another platform than the CPU, and where this host has no products in one order.
    """
    before = os.environ.pop(VARIABLE, None)
    try:
        if wanted:
            install()
            os.environ[VARIABLE] = "1"
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def install() -> None:
    """Let vLLM ask us how it packs a layer, in this process. Idempotent. Raises RuntimeError off the CPU."""
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise RuntimeError("trainer.body=mirrored is for rollouts on the CPU so far; use trainer.body=model")
    own_dispatch, own_check = utils.dispatch_cpu_unquantized_gemm, utils.check_cpu_sgl_kernel
    if own_dispatch.__module__ == __name__:
        return
    packed = [False]  # inside a steady layer's dispatch: every size goes to the packed kernel

    def check(n: int, k: int, dtype: torch.dtype) -> bool:
        return _fits(n, k, dtype) if packed[0] else own_check(n, k, dtype)

    def dispatch(layer: nn.Module, remove_weight: bool) -> None:
        if not isinstance(layer, LinearBase) or not getattr(layer, MARK, enabled()):
            return own_dispatch(layer, remove_weight)
        widened.decide(layer.weight.dtype)
        fits = not layer.weight.is_meta and layer.weight.ndim == 2 and _fits(*layer.weight.shape, layer.weight.dtype)
        packed[0] = fits
        try:
            own_dispatch(layer, remove_weight and (fits or widened.is_widened(layer.weight.dtype)))
        finally:
            packed[0] = False
        _keep_order(layer, fits)
        setattr(layer, MARK, True)

    utils.dispatch_cpu_unquantized_gemm, utils.check_cpu_sgl_kernel = dispatch, check


def unsteady(model: nn.Module) -> list[str]:
    """Names of linear layers whose order of additions may depend on the number of rows; empty in a steady engine."""
    from vllm.model_executor.layers.linear import LinearBase

    return [n for n, m in model.named_modules() if isinstance(m, LinearBase) and not getattr(m, MARK, False)]


def _fits(outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Shapes that the packed kernel multiplies with tiles."""
    tiles = torch.cpu._is_amx_tile_supported() and not widened.is_widened(dtype)
    return tiles and dtype == torch.bfloat16 and inputs % 32 == 0 and outputs % 16 == 0


def _keep_order(layer: nn.Module, packed: bool) -> None:
    """Wrap what vLLM has just put in place."""
    own = layer.cpu_linear
    if packed:

        def cpu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            if len(rows) >= FEWEST:
                return own(x, weight, bias)
            padded = torch.nn.functional.pad(rows, (0, 0, 0, FEWEST - len(rows)))
            return own(padded, weight, bias)[: len(rows)].view(*x.shape[:-1], -1)

        layer.cpu_linear = cpu_linear
        return
    if why := steady.missing(torch.bfloat16):
        raise RuntimeError(f"trainer.body=mirrored: {why}; use trainer.body=model")
    if not widened.is_widened(torch.bfloat16):
        layer.cpu_linear = lambda x, weight, bias: steady.linear(x, layer.weight, bias)
