"""token_logprobs(): log-probabilities and entropy of the tokens present, from hidden states. The only file that shifts.

Entry t of every result is about token t and comes from the hidden state at t - 1; entry 0 has no context and is 0.0.

Two modes, one difference, the softmax. "fast" sums exp over tiles: constant memory, and closer to float64 than a
float32 log_softmax over a long row; the default, since training wants both. "exact_mirror" applies torch.log_softmax to
whole rows, in the operations and the order of vLLM's sampler, so logprobs carry the engine's own bits for equal hidden
states wherever `head.route` is a bf16 route: what `old_logprobs` should use. Gradients come from the tiles in both.

B sequences, L padded length, N tokens that are scored, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlalign.head.projection import check_operands
from rlalign.logprobs.forward import BARRED, Kept, Transform
from rlalign.logprobs.op import flat_logprobs
from rlalign.logprobs.vocab_parallel import VocabShard, sharded_logprobs
from rlalign.types import KeptSets

__all__ = ["from_logits", "token_logprobs", "token_values"]

Mode = Literal["fast", "exact_mirror"]


def token_logprobs(
    hidden_BLD: Tensor,
    weight_VD: Tensor,
    token_ids_BL: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    chunk: int | None = None,
    keep_mib: int = 0,
    entropy: bool = False,
    mode: Mode = "fast",
    mask: Tensor | None = None,
    kept: Tensor | KeptSets | None = None,
    cu_seqlens: Tensor | None = None,
    shard: VocabShard | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each token present, [B, L] float32 in nats; with `entropy` also the entropy before each token.

    Logits are `head.project`, then soft cap, logit scale and division by the temperature, in vLLM's order.

    hidden [B, L, D], weight [V, D], bias [V]: float32, bfloat16 or float16; token_ids [B, L] int64.
    temperature: one number, or [B] or [B, L] float32 (entry t for token t). vocab_size: real vocabulary where the
    weight is padded. chunk: tokens per tile; more is faster and larger.
    keep_mib: MiB of logits that may stay in memory from the forward to the backward pass instead of being formed again;
    4 * N * V bytes (and 2 % more) hold them all. 0: constant memory. Gradients have the same bits, whatever it is.
    mask [B, L] bool: score these tokens only; the others are 0.0, cost nothing and get no gradient (on a GPU their
    count is read back once). cu_seqlens [S + 1] int: boundaries of the sequences packed into a batch of one; the first
    token of each has no context and is 0.0, like everything after the last boundary.
    kept: the ids each token was sampled from (top-p, top-k, min-p), as KeptSets, or [B, L, K] int64 filled up with -1;
    logprobs, entropies and gradients are those of the distribution renormalised over them, as the engine's are. Ragged
    inside: 4 bytes an id, whatever the widest set. `truncation.kept_sets` computes sets from these same operands.
    shard: this rank's slice of a weight split over a process group; weight and bias are the slice, vocab_size and token
    ids are global. Every rank calls with equal hidden states.

    Differentiable once in hidden, weight and bias, for any per-token upstream gradient. Under ZeRO-3 call it inside
    the forward of the module that owns the weight.
    Raises ValueError before any product for wrong shapes or dtypes, an empty batch, a mask that keeps nothing, a weight
    without data; and, on CPU only (elsewhere a look at values would synchronise: token ids outside the vocabulary and
    non-finite hidden states give NaN), for such values and temperatures that are not positive.
    """
    check_operands(hidden_BLD, weight_VD, bias)
    vocab_rows = weight_VD.shape[0] if shard is None else shard.total
    _check_metadata(hidden_BLD, token_ids_BL, temperature, soft_cap, logit_scale, chunk, keep_mib)
    _check_vocabulary(mode, vocab_rows, vocab_size, shard)
    sets = _kept_sets(kept, token_ids_BL)
    scored_BL = _scored(token_ids_BL, mask, cu_seqlens)
    real = vocab_size or vocab_rows
    keep_mib = keep_mib if _differentiated(hidden_BLD, weight_VD, bias) else 0
    if hidden_BLD.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(hidden_BLD, token_ids_BL, bias, temperature, scored_BL, sets, real)
    rows = _shift(hidden_BLD, token_ids_BL, _temperature(temperature, token_ids_BL), sets, scored_BL)
    if shard is None:
        results = flat_logprobs(
            rows.hidden_ND, weight_VD, bias, rows.target_N, rows.temperature_N,
            None if rows.kept is None else rows.kept.ids_E, None if rows.kept is None else rows.kept.start_M,
            soft_cap, logit_scale, real, chunk, entropy, mode == "exact_mirror", keep_mib,
        )[:2]  # fmt: skip
    else:
        transform = Transform(soft_cap, logit_scale, rows.temperature_N)
        options = (rows.target_N, transform, rows.kept, shard, real, chunk, entropy, keep_mib)
        results = sharded_logprobs(rows.hidden_ND, weight_VD, bias, *options)
    logprobs_BL = rows.aligned(results[0], token_ids_BL.shape)
    return (logprobs_BL, rows.aligned(results[1], token_ids_BL.shape)) if entropy else logprobs_BL


def token_values(hidden_BLD: Tensor, weight_1D: Tensor, bias_1: Tensor, mask_BL: Tensor) -> Tensor:
    """A critic's value before each masked token, [B, L] float32; 0.0 elsewhere, where nothing is computed.

    The product is float32 whatever the operands' dtype; gradients return in theirs. Right for packed rows too: the first token
    of a sequence is in no mask.
    """
    rows = _shift(hidden_BLD, mask_BL.long(), None, None, mask_BL.clone())
    value_N1 = torch.nn.functional.linear(rows.hidden_ND.float(), weight_1D.float(), bias_1.float())
    return rows.aligned(value_N1.squeeze(1), mask_BL.shape)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What is scored, flat: tokens, the hidden states before them, their options; index_N into B * L, None for all."""

    hidden_ND: Tensor
    target_N: Tensor
    temperature_N: Tensor | None
    kept: Kept | None
    index_N: Tensor | None

    def aligned(self, value_N: Tensor, shape: torch.Size) -> Tensor:
        """[B, L] with each value at its token and 0.0 elsewhere."""
        if self.index_N is None:
            return torch.nn.functional.pad(value_N.view(shape[0], shape[1] - 1), (1, 0))
        return value_N.new_zeros(shape.numel()).index_put((self.index_N,), value_N).view(shape)


def _shift(
    hidden_BLD: Tensor,
    token_ids_BL: Tensor,
    temperature_BL: Tensor | None,
    sets: KeptSets | None,
    scored_BL: Tensor | None,
) -> _Rows:
    """Pair every scored token t with the hidden state at t - 1."""
    if scored_BL is None:
        temperature_N = None if temperature_BL is None else temperature_BL[:, 1:].flatten(0, 1)
        target_N = token_ids_BL[:, 1:].flatten(0, 1)
        position_N = torch.arange(token_ids_BL.numel()).view(token_ids_BL.shape)[:, 1:].flatten()
        kept = None if sets is None else _known(sets, position_N, hidden_BLD.device)
        return _Rows(hidden_BLD[:, :-1].flatten(0, 1), target_N, temperature_N, kept, index_N=None)
    scored_BL[:, 0] = False  # on CPU this was an error already; elsewhere nothing has looked at the values
    index_N = scored_BL.flatten().nonzero().squeeze(1)
    temperature_N = None if temperature_BL is None else temperature_BL.flatten(0, 1)[index_N]
    target_N = token_ids_BL.flatten(0, 1)[index_N]
    kept = None if sets is None else _known(sets, index_N.cpu(), hidden_BLD.device)
    hidden_ND = hidden_BLD.flatten(0, 1).index_select(0, index_N - 1)
    return _Rows(hidden_ND, target_N, temperature_N, kept, index_N=index_N)


def _known(sets: KeptSets, position_N: Tensor, device: torch.device) -> Kept:
    ids_E, count_N = sets.at(position_N)
    if not bool((count_N > 0).all()):
        raise ValueError(
            f"token_logprobs: {int((count_N == 0).sum())} of {len(count_N)} scored tokens have an empty kept set: nothing to "
            "renormalise over; give each the ids it was sampled from (`truncation.kept_sets` computes them), or mask it out"
        )
    return Kept.of(ids_E, count_N, device)


def _differentiated(*operands: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)


def _scored(token_ids_BL: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """[B, L] bool of the tokens to score, or None for all that have a context."""
    if mask is None and cu_seqlens is None:
        return None
    scored_BL = torch.ones_like(token_ids_BL, dtype=torch.bool) if mask is None else mask.clone()
    if scored_BL.shape != token_ids_BL.shape or scored_BL.dtype != torch.bool:
        raise ValueError(
            f"token_logprobs: mask must be bool {tuple(token_ids_BL.shape)}, "
            f"got {scored_BL.dtype} {tuple(scored_BL.shape)}"
        )
    if cu_seqlens is not None:
        if token_ids_BL.shape[0] != 1 or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
            raise ValueError(
                "token_logprobs: cu_seqlens [S + 1] integers describes sequences packed into a batch of one, got "
                f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)} for token_ids {tuple(token_ids_BL.shape)}"
            )
        position_L = torch.arange(token_ids_BL.shape[1], device=token_ids_BL.device)
        starts = torch.isin(position_L, cu_seqlens.to(position_L.device)[:-1])
        scored_BL &= ~starts & (position_L < cu_seqlens[-1])
    if mask is None:
        scored_BL[:, 0] = False
    return scored_BL


def _temperature(temperature: float | Tensor, token_ids_BL: Tensor) -> Tensor | None:
    if not isinstance(temperature, Tensor):
        # vLLM divides by a float32 tensor; a Python number would become a multiplication on CUDA
        value = torch.full((1, 1), temperature, dtype=torch.float32, device=token_ids_BL.device)
        return None if temperature == 1.0 else value.expand(token_ids_BL.shape)
    temperature = temperature.to(torch.float32)
    return (temperature.unsqueeze(1) if temperature.dim() == 1 else temperature).expand(token_ids_BL.shape)


def _check_metadata(
    hidden_BLD: Tensor,
    token_ids_BL: Tensor,
    temperature: float | Tensor,
    soft_cap: float | None,
    logit_scale: float,
    chunk: int | None,
    keep_mib: int,
) -> None:
    if hidden_BLD.dim() != 3 or token_ids_BL.shape != hidden_BLD.shape[:2]:
        raise ValueError(
            f"token_logprobs: expected hidden [B, L, D] and token_ids [B, L], got {tuple(hidden_BLD.shape)} and "
            f"{tuple(token_ids_BL.shape)}"
        )
    if token_ids_BL.numel() == 0:
        raise ValueError(f"token_logprobs: empty batch, token_ids has shape {tuple(token_ids_BL.shape)}")
    if token_ids_BL.dtype != torch.int64 or token_ids_BL.device != hidden_BLD.device:
        raise ValueError(
            f"token_logprobs: token_ids must be int64 on {hidden_BLD.device}, got {token_ids_BL.dtype} on "
            f"{token_ids_BL.device}"
        )
    if isinstance(temperature, Tensor):
        batch, length = token_ids_BL.shape
        if temperature.shape not in ((batch,), (batch, length)) or not temperature.is_floating_point():
            raise ValueError(
                f"token_logprobs: temperature must be a number, [{batch}] or [{batch}, {length}], got "
                f"{temperature.dtype} {tuple(temperature.shape)}"
            )
    elif not 0.0 < temperature < float("inf"):
        raise ValueError(f"token_logprobs: temperature must be positive, got {temperature}; score greedy tokens at 1.0")
    for name, value in (("soft_cap", soft_cap), ("chunk", chunk)):
        if value is not None and not value > 0:
            raise ValueError(f"token_logprobs: {name} must be positive or None, got {value}")
    if keep_mib < 0 or keep_mib != int(keep_mib):
        raise ValueError(f"token_logprobs: keep_mib must be a whole number of MiB, 0 for none, got {keep_mib}")
    if not abs(logit_scale) < float("inf") or logit_scale == 0.0:
        raise ValueError(f"token_logprobs: logit_scale must be finite and not 0, got {logit_scale}")


def _check_vocabulary(mode: Mode, vocab_rows: int, vocab_size: int | None, shard: VocabShard | None) -> None:
    if mode not in ("fast", "exact_mirror"):
        raise ValueError(f'token_logprobs: mode must be "fast" or "exact_mirror", got {mode!r}')
    if shard is not None and mode == "exact_mirror":
        raise ValueError(
            'token_logprobs: mode "exact_mirror" reads whole rows of logits; gather the weight or use "fast"'
        )
    if vocab_size is not None and not 0 < vocab_size <= vocab_rows:
        raise ValueError(f"token_logprobs: vocab_size must be in 1..{vocab_rows}, got {vocab_size}")


def _kept_sets(kept: Tensor | KeptSets | None, token_ids_BL: Tensor) -> KeptSets | None:
    if isinstance(kept, KeptSets):
        if kept.count_BL.shape != token_ids_BL.shape:
            raise ValueError(
                f"token_logprobs: kept holds sets of {tuple(kept.count_BL.shape)} tokens for token_ids {tuple(token_ids_BL.shape)}"
            )
        return kept
    if kept is None:
        return None
    if kept.dim() != 3 or kept.shape[:2] != token_ids_BL.shape or kept.dtype != torch.int64:
        raise ValueError(
            f"token_logprobs: kept must be int64 {[*token_ids_BL.shape, 'K']} or KeptSets, got {kept.dtype} {tuple(kept.shape)}"
        )
    return KeptSets.dense(kept)


def _check_values(
    hidden_BLD: Tensor,
    token_ids_BL: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    scored_BL: Tensor | None,
    sets: KeptSets | None,
    vocab_size: int,
) -> None:
    """What only the values tell; for tensors in host memory."""
    if scored_BL is None:
        scored_BL = torch.ones_like(token_ids_BL, dtype=torch.bool)
        scored_BL[:, 0] = False
    elif bool(scored_BL[:, 0].any()):
        raise ValueError("token_logprobs: mask holds token 0 of a sequence, which has no context to be predicted from")
    elif not bool(scored_BL.any()):
        raise ValueError("token_logprobs: mask (with cu_seqlens) keeps no token; skip this batch")
    wrong_id = scored_BL & ((token_ids_BL < 0) | (token_ids_BL >= vocab_size))
    if bool(wrong_id.any()):
        b, t = wrong_id.nonzero()[0].tolist()
        raise ValueError(
            f"token_logprobs: token_ids[{b}, {t}] = {int(token_ids_BL[b, t])} is outside the vocabulary of "
            f"{vocab_size}; mask padding out, or check that the tokenizer belongs to this model"
        )
    if sets is not None:
        sets.require_of(token_ids_BL, scored_BL, what="token_logprobs")
    broken = ~hidden_BLD.detach().isfinite().all(-1)
    broken = scored_BL[:, 1:] & broken[:, :-1]
    if bool(broken.any()):
        b, t = broken.nonzero()[0].tolist()
        raise ValueError(f"token_logprobs: hidden[{b}, {t}] is not finite; the body overflowed or got NaN weights")
    if bias is not None and not bool(bias.detach().isfinite().all()):
        raise ValueError("token_logprobs: the bias is not finite; leave tokens out with vocab_size instead of -inf")
    if isinstance(temperature, Tensor) and not bool((temperature > 0).all() and temperature.isfinite().all()):
        raise ValueError("token_logprobs: every temperature must be positive and finite; score greedy sequences at 1.0")


def from_logits(
    logits_BLV: Tensor,
    token_ids_BL: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    kept: KeptSets | None = None,
) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies [B, L] float32 from logits that exist: what a trainer without the float32 head does.

    The softmax is in float32 whatever the logits are rounded to. Alignment, `mask` and `kept` as in `token_logprobs`.
    """
    x_BLV = logits_BLV[:, :-1].float() / temperature
    if kept is not None:
        sets = Kept.of(kept.ids_E, kept.count_BL[:, 1:].flatten(), x_BLV.device)
        n, vocab = x_BLV.shape[0] * x_BLV.shape[1], x_BLV.shape[2]
        x_BLV = x_BLV + torch.where(sets.mask(slice(0, n), slice(0, vocab)), 0.0, BARRED).view(x_BLV.shape)
    logprobs_BLV = x_BLV.log_softmax(-1)
    chosen_BL = logprobs_BLV.gather(-1, token_ids_BL[:, 1:, None])[..., 0]
    probs_BLV = logprobs_BLV.exp()
    entropy_BL = -(probs_BLV * logprobs_BLV.masked_fill(probs_BLV == 0, 0.0)).sum(-1)  # 0 * -inf would be NaN
    aligned = [torch.nn.functional.pad(value_BL, (1, 0)) for value_BL in (chosen_BL, entropy_BL)]
    if mask is not None:
        aligned = [torch.where(mask, value_BL, 0.0) for value_BL in aligned]
    return aligned[0], aligned[1]
