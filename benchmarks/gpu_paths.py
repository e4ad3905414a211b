"""The ways of benchmarks/gpu.py: this library's, torch's and the peers'. Peers come from their released packages, unchanged.

A way scores: hidden [N, D], weight [V, D], targets [N] -> logprobs [N], differentiable. N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlalign.head.projection import project
from rlalign.head.triton import CUBLAS, ONE_PASS, TRITON, VARIABLE
from rlalign.logprobs import token_logprobs

Score = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Way:
    """float32: whether logits are float32, unrounded; made by `load`, which raises ImportError where a package is missing."""

    name: str
    float32: bool
    load: Callable[[], Score]


@contextmanager
def head(asked: str) -> Iterator[None]:
    """RLALIGN_GPU_HEAD for a while."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = asked
    try:
        yield
    finally:
        os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})


def ours(asked: str, *, mode: str = "fast", chunk: int | None = None) -> Score:
    """token_logprobs with this head. Its backward pass runs outside of this call and asks again: see `asking`."""

    def score(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
        # one row too many behind, since token_logprobs pairs token t with the hidden state at t - 1
        hidden = F.pad(hidden_ND, (0, 0, 0, 1)).unsqueeze(0)
        return token_logprobs(hidden, weight_VD, F.pad(target_N, (1, 0)).unsqueeze(0), mode=mode, chunk=chunk)[0, 1:]

    score.asked = asked
    return score


def asking(score: Score) -> str:
    """The head that a way wants while it runs, forward and backward."""
    return getattr(score, "asked", CUBLAS)


def _product(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    return project(hidden_ND, weight_VD)  # on CUDA mm(out_dtype=float32)


def _compiled_bf16() -> Score:
    torch._dynamo.config.recompile_limit = 64  # beyond it torch would run eagerly, in silence
    return torch.compile(full_bf16, dynamic=False)


def full_fp32(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """All logits at once, float32."""
    return _product(hidden_ND, weight_VD).log_softmax(-1).gather(-1, target_N[:, None])[:, 0]


def full_bf16(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """All logits at once, rounded to bfloat16, and a float32 softmax: the default of most trainers."""
    return F.linear(hidden_ND, weight_VD).float().log_softmax(-1).gather(-1, target_N[:, None])[:, 0]


def _trl(dtype: torch.dtype) -> Score:
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    return lambda h, w, t: function.apply(h.to(dtype), w.to(dtype), None, t, 1.0, 8192, None, 1.0, ())[0]


def _verl_torch() -> Score:
    module = importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO(impl_backend="torch")
    return lambda h, w, t: module(h[None], w, t[None])[0][0]


def _verl_triton() -> Score:
    function = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return lambda h, w, t: function(h, w, t, 1.0, "none")[0]


def _liger_cute() -> Score:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise ImportError("its CuTe kernel is for compute capability 9.0")
    name = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
    importlib.import_module(name)  # else the next falls back to torch
    function = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    return lambda h, w, t: -function.LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, t)


def _liger_ppo() -> Score:
    loss = importlib.import_module("liger_kernel.chunked_loss.fused_linear_ppo").LigerFusedLinearPPOBase
    return lambda h, w, t: loss.chunk_forward(h[None], w, t[None])[0]


def _cce() -> Score:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    impl = "cce" if torch.cuda.is_available() else "torch_compile"
    return lambda h, w, t: -function(h, w, t, impl=impl, reduction="none", filter_eps=None)


def _torch_core() -> Score:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
    return lambda h, w, t: -function(h, w, t, reduction="none")


SCORING = (
    Way("rlalign triton", True, lambda: ours(TRITON)),
    Way("rlalign triton exact_mirror", True, lambda: ours(TRITON, mode="exact_mirror")),
    Way("rlalign cublas", True, lambda: ours(CUBLAS)),
    Way("rlalign cublas_one_pass", True, lambda: ours(ONE_PASS)),
    Way("rlalign cublas_one_pass, chunk 512", True, lambda: ours(ONE_PASS, chunk=512)),
    Way("full logits float32", True, lambda: full_fp32),
    Way("full logits bf16", False, lambda: full_bf16),
    Way("torch.compile bf16", False, _compiled_bf16),
    Way("Liger CuTe (fp16-staged)", False, _liger_cute),
    Way("Liger fused linear PPO", False, _liger_ppo),
    Way("cut-cross-entropy", False, _cce),
    Way("verl Triton", True, _verl_triton),
    Way("verl torch", False, _verl_torch),
    Way("TRL chunked bf16", False, lambda: _trl(torch.bfloat16)),
    Way("TRL chunked float32", True, lambda: _trl(torch.float32)),
    Way("torch linear_cross_entropy", False, _torch_core),
)


def _decoding(asked: str) -> Score:
    def score(hidden_ND: Tensor, weight_VD: Tensor, _: Tensor) -> Tensor:
        return project(hidden_ND, weight_VD)

    score.asked = asked
    return score


DECODING = (
    Way("rlalign triton", True, lambda: _decoding(TRITON)),
    Way("mm(out_dtype=float32): rlalign cublas, vLLM native", True, lambda: _decoding(CUBLAS)),
    Way("bf16 head, logits rounded", False, lambda: lambda h, w, _: F.linear(h, w).float()),
    Way("float32 copy of the weight, each call", True, lambda: lambda h, w, _: F.linear(h.float(), w.float())),
)
