"""Which variant of rlalign.trainer.rounding rounds as a GPU engine's kernel does: the second part of `python -m benchmarks.gpu`.

Each kernel and each variant get the same inputs; the table counts the elements that differ. On a GPU the kernels are vLLM's and
FlashInfer's where installed, beside their emulation here. On a CPU the emulations stand for them, bit by bit: packed bf16
additions and products (one rounding each), squares of bf16 (exact in float32, so that a fused multiply-add changes nothing), the
sum of squares in the order of threads, warp shuffles and warps. Not to be emulated is `rsqrtf`, which CUDA allows two units in the
last place; `units` moves it by as many. Read from vLLM 0.32: csrc/layernorm_kernels.cu, type_convert.cuh, pos_encoding_kernels.cu,
activation_kernels.cu; FlashInfer's norm by what it computes, its order of additions not. N tokens, D features, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign.trainer.rounding import variants
from rlalign.trainer.rounding.variants import ACTIVATION, ADD_AND_NORM, MODEL, ROPE

EPSILON = 1e-6
WIDTH, WARP = 8, 32  # bf16 elements of a thread's load, threads that shuffle
BUSY = 256  # rows from which vLLM's fused norm takes blocks of 256 threads instead of 1,024
VLLM, FLASHINFER = "vLLM", "FlashInfer"


@dataclass(frozen=True)
class Inputs:
    """Of all three ops, in bf16: stream and branch [N, D], weight [D], heads [H, N, E], cosines [N, E], gate and up [N, D]."""

    stream: Tensor
    branch: Tensor
    weight: Tensor
    heads: Tensor
    cos: Tensor
    sin: Tensor
    gate: Tensor
    up: Tensor

    def to(self, device: torch.device) -> Inputs:
        return Inputs(*(x.to(device) for x in vars(self).values()))


def inputs(n: int, d: int, e: int = 64) -> Inputs:
    """Made-up states of the size that a model's have."""
    g = torch.Generator().manual_seed(0)
    stream, branch, gate, up = (torch.randn(n, d, generator=g) * size for size in (3.0, 0.5, 2.0, 1.0))
    angles = torch.arange(n)[:, None] / 10000 ** (torch.arange(0, e, 2) / e)
    cos, sin = (torch.cat((f(angles), f(angles)), dim=-1) for f in (torch.cos, torch.sin))
    made = (
        stream,
        branch,
        1 + 0.1 * torch.randn(d, generator=g),
        torch.randn(4, n, e, generator=g),
        cos,
        sin,
        gate,
        up,
    )
    return Inputs(*(x.bfloat16() for x in made))


def block_sum(terms_NT: Tensor) -> Tensor:
    """[N] float32 sums of one term a thread, as cub::BlockReduce adds them: in a warp by shuffles of 1, 2, 4, 8, 16, then the
    warps one after the other. Thread counts are filled up with zeros to whole warps."""
    lanes = torch.nn.functional.pad(terms_NT, (0, -terms_NT.shape[1] % WARP)).view(len(terms_NT), -1, WARP)
    for offset in (1, 2, 4, 8, 16):
        lanes = lanes + torch.nn.functional.pad(lanes[..., offset:], (0, offset))
    total = lanes[:, 0, 0]
    for warp in range(1, lanes.shape[1]):
        total = total + lanes[:, warp, 0]
    return total


def sums_of_squares(rounded_ND: Tensor, threads: int) -> Tensor:
    """[N] float32: a thread takes every `threads`-th vector of eight; it adds pairs of squares, then the vector to what it has."""
    n, d = rounded_ND.shape
    vectors = rounded_ND.view(n, d // WIDTH, WIDTH).square()
    each = torch.zeros(n, d // WIDTH)
    for pair in range(0, WIDTH, 2):
        each = each + (vectors[..., pair] + vectors[..., pair + 1])
    held = torch.zeros(n, threads)
    for start in range(0, d // WIDTH, threads):
        part = each[:, start : start + threads]
        held[:, : part.shape[1]] += part
    return block_sum(held)


def vllm_add_and_norm(given: Inputs, units: int = 0) -> Tensor:
    """vLLM's fused_add_rms_norm: the sum rounded, its squares added in the kernel's order, rounded after scale and weight."""
    rounded_ND = (given.stream + given.branch).float()  # a packed addition: one rounding
    n, d = rounded_ND.shape
    squares_N = sums_of_squares(rounded_ND, min(d, 1024 if n < BUSY else 256))
    scale_N = (squares_N / d + EPSILON).double().rsqrt().float()
    scale_N = (scale_N.view(torch.int32) + units).view(torch.float32)
    return (rounded_ND * scale_N[:, None]).bfloat16() * given.weight


def flashinfer_add_and_norm(given: Inputs) -> Tensor:
    """FlashInfer's: the unrounded sum normalised and weighted in float32, rounded once."""
    wide = given.stream.float() + given.branch.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    return (wide * scale * given.weight.float()).bfloat16()


def rope(given: Inputs) -> Tensor:
    """vLLM's rotary_embedding: cosines of the model's dtype, products (exact in float32) and their difference rounded once."""
    x, y = given.heads.double().chunk(2, dim=-1)
    cos, sin = (t.double().chunk(2, dim=-1)[0] for t in (given.cos, given.sin))
    return torch.cat((x * cos - y * sin, y * cos + x * sin), dim=-1).float().bfloat16()


def vllm_activation(given: Inputs) -> Tensor:
    """vLLM's silu_and_mul: x / (1 + exp(-x)) in float32, rounded, then a bf16 product."""
    return _silu(given).bfloat16() * given.up


def flashinfer_activation(given: Inputs) -> Tensor:
    """FlashInfer's: activation and product in float32, rounded once."""
    return (_silu(given) * given.up.float()).bfloat16()


def _silu(given: Inputs) -> Tensor:
    x = given.gate.float()
    return x / (1 + torch.exp(-x))


EMULATED: dict[tuple[str, str], Callable[[Inputs], Tensor]] = {
    (ADD_AND_NORM, VLLM): vllm_add_and_norm,
    (ADD_AND_NORM, FLASHINFER): flashinfer_add_and_norm,
    (ROPE, VLLM): rope,
    (ACTIVATION, VLLM): vllm_activation,
    (ACTIVATION, FLASHINFER): flashinfer_activation,
}
EXPECTED = {  # the variant that rounds where the kernel does
    (ADD_AND_NORM, VLLM): MODEL,
    (ADD_AND_NORM, FLASHINFER): variants.SUM_ROUNDED_LATE_WEIGHT_WIDE,
    (ROPE, VLLM): variants.ROUNDED_ONCE,
    (ACTIVATION, VLLM): MODEL,
    (ACTIVATION, FLASHINFER): variants.ROUNDED_ONCE,
}


def ways(op: str, given: Inputs) -> dict[str, Tensor]:
    """Variant -> what it makes of the inputs, on their device."""
    if op == ADD_AND_NORM:
        rounded, wide = variants.added(given.stream, given.branch)
        others = variants.norms(rounded, wide, given.weight, EPSILON)
        own = variants.norm(rounded.float(), given.weight, EPSILON)
        return {MODEL: own, **{name: way() for name, way in others.items()}}
    if op == ROPE:
        turn = (given.heads, given.cos, given.sin)
        return {
            MODEL: variants.rotated_model(*turn),
            variants.ROUNDED_ONCE: variants.rotated(*turn),
            variants.TRUNCATED_ONCE: variants.rotated(*turn, toward_zero=True),
        }
    silu = torch.nn.functional.silu
    return {
        MODEL: variants.activated_model(given.gate, given.up, silu),
        variants.ROUNDED_ONCE: variants.activated_once(given.gate, given.up, silu),
    }


def installed(op: str, engine: str, given: Inputs) -> Tensor:
    """The engine's own kernel on a GPU. Raises ImportError or AttributeError where it is not installed."""
    if engine == VLLM:
        from vllm import _custom_ops as ops
    else:
        import flashinfer as ops
    if op == ADD_AND_NORM:
        out, stream = given.branch.clone(), given.stream.clone()
        name = "fused_add_rms_norm" if engine == VLLM else "fused_add_rmsnorm"
        getattr(ops, name)(out, stream, given.weight, EPSILON)
        return out
    if op == ACTIVATION:
        both = torch.cat((given.gate, given.up), dim=-1)
        if engine == FLASHINFER:
            return ops.silu_and_mul(both)
        torch.ops._C.silu_and_mul(out := torch.empty_like(given.gate), both)
        return out
    heads_NHE = given.heads.transpose(0, 1).contiguous()
    half = given.cos.shape[-1] // 2
    cache = torch.cat((given.cos[:, :half], given.sin[:, :half]), dim=-1).contiguous()
    at = torch.arange(len(heads_NHE), device=cache.device)
    ops.rotary_embedding(at, states := heads_NHE.flatten(1), None, heads_NHE.shape[-1], cache, True)
    return states.view(heads_NHE.shape).transpose(0, 1)


def rows(device: torch.device) -> Iterator[dict]:
    """One row for each kernel and variant: the share of elements that differ, and that from the kernel's emulation."""
    n, d = (128, 4096) if device.type == "cpu" else (512, 4096)
    here = inputs(n, d)
    there = here.to(device)
    for (op, engine), emulate in EMULATED.items():
        emulated, row = emulate(here), {"op": op, "kernel": engine, "expected": EXPECTED[op, engine]}
        try:
            kernel = installed(op, engine, there).cpu() if device.type == "cuda" else emulated
        except Exception as error:  # not installed, or of another version: a row that says so
            yield row | {"status": f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"}
            kernel = emulated
        ran = "its own" if kernel is not emulated else "emulated"
        for name, found in ways(op, there).items():
            yield row | {
                "ran": ran,
                "variant": name,
                "differ": differing(found.cpu(), kernel),
                "from_emulation": differing(found.cpu(), emulated),
            }


def differing(found: Tensor, kernel: Tensor) -> float:
    """Share of elements with other bits."""
    return float((found.view(torch.int16) != kernel.view(torch.int16)).double().mean())


def markdown(found: list[dict]) -> list[str]:
    """The rows as a table, in the order they were found; empty without any."""
    if not found:
        return []
    lines = [
        "Body: elements of which a variant makes other bits than the kernel, `*` the variant that rounds where it does:",
        "",
    ]
    lines += ["| op | kernel | ran | variant | differ from it | from its emulation |", "|---|---|---|---|--:|--:|"]
    for row in found:
        if "status" in row:
            lines.append(f"| {row['op']} | {row['kernel']} | {row['status']} | | | |")
            continue
        star = " *" if row["variant"] == row["expected"] else ""
        shares = f"{row['differ']:.3%} | {row['from_emulation']:.3%}"
        lines.append(f"| {row['op']} | {row['kernel']} | {row['ran']} | {row['variant']}{star} | {shares} |")
    return [*lines, ""]
