"""mirror_check(): given tokens through a living engine and a living model, at the same weights, in one call.

Suffixes: B sequences, L padded length, N tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign import mismatch
from rlalign.rollout.attached import AttachedEngine
from rlalign.trainer import head_isolation
from rlalign.trainer.live_mirror import Mirror

__all__ = ["LagZero", "mirror_check", "require_same_head"]

SHOWN = ("k1", "k3", "abs_mean", "p99", "abs_max", "pearson_prob")
HEAD_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LagZero:
    """Mismatch at equal weights. whole: of the models; heads: of the two heads on the same hidden states, None for a sharded one.

    Values as `rlalign.compare` names them, in nats; heads also has each side's mean distance from float64 (rollout_error,
    trainer_error) and what rounding logits to bfloat16 would cost (bf16_error).
    """

    tokens: int
    whole: dict[str, float]
    heads: dict[str, float] | None

    def __str__(self) -> str:
        rows = [("", *SHOWN), ("whole model", *(f"{self.whole[n]:.2e}" for n in SHOWN))]
        if self.heads is not None:
            rows.append(("heads alone", *(f"{self.heads[n]:.2e}" for n in SHOWN)))
        table = "\n".join(f"{row[0]:<12}" + "".join(f"{cell:>14}" for cell in row[1:]) for row in rows)
        return f"{table}\n{self.tokens} tokens, nats, temperature 1"


def mirror_check(engine: AttachedEngine, model: Mirror, token_ids: Sequence[Sequence[int]]) -> LagZero:
    """Score the same tokens on both sides and compare: engine mismatch without staleness, sampling or a loop around it.

    engine: from `rlalign.attach`, an LLM or a server. model: from `rlalign.mirror`. token_ids: sequences of two tokens or more;
    each token but the first is scored, at temperature 1 (vLLM applies none to prompt logprobs).
    Weights must be equal on both sides: `publish` or `verify` first. Raises RuntimeError for a head on one side only, ValueError
    for tokens that cannot be scored.
    """
    if not isinstance(model, Mirror):
        raise ValueError(
            f"mirror_check: got a {type(model).__name__} where a mirror belongs: its head is not the engine's; rlalign.mirror it"
        )
    require_same_head(engine, model)
    model.require_in_place()
    if not token_ids or min(len(each) for each in token_ids) < 2:
        raise ValueError("mirror_check: give sequences of at least two tokens; the first of each has no context")
    rollout_BL, ids_BL, mask_BL = _padded(engine.score(token_ids), token_ids)
    device = next(model.inner.parameters()).device
    inputs = {"input_ids": ids_BL.to(device), "attention_mask": mask_BL.long().to(device)}
    inputs["attention_mask"][:, 0] = 1
    training = model.model.training
    model.model.eval()
    try:
        with torch.no_grad():
            old_BL, _ = model.token_logprobs(inputs, mask_BL.to(device), exact=model.head_dtype == "float32")
            heads = _heads(engine, model, inputs, ids_BL, mask_BL)
    finally:
        model.model.train(training)
    whole = mismatch.compare(old_BL.cpu(), rollout_BL, mask_BL, positions=False)
    return LagZero(tokens=int(whole["tokens"]), whole={name: whole[name] for name in SHOWN}, heads=heads)


def require_same_head(engine: AttachedEngine, model: Mirror | None) -> None:
    """Raise RuntimeError where only one of the two sides has the head: no better than none, and its numbers look plausible."""
    trainer = "the model's own" if model is None else model.head_dtype
    if engine.head_dtype == "model" and model is not None:
        raise RuntimeError(
            f"a head on one side only: the trainer is mirrored ({trainer}), the engine runs vLLM's own head. Start the engine "
            f"with RLALIGN_HEAD={trainer}, or restore() the mirror"
        )
    if engine.head_dtype != "model" and trainer != engine.head_dtype:
        raise RuntimeError(
            f"a head on one side only: the engine runs {engine.head_dtype} ({engine.mode}), the trainer {trainer}. Mirror it: "
            f'rlalign.mirror(model, head_dtype="{engine.head_dtype}")'
        )


def _padded(logprobs: Sequence[Sequence[float]], token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    length = max(len(each) for each in token_ids)
    shape = (len(token_ids), length)
    rollout_BL, ids_BL = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64)
    mask_BL = torch.zeros(shape, dtype=torch.bool)
    for b, (numbers, ids) in enumerate(zip(logprobs, token_ids, strict=True)):
        rollout_BL[b, : len(ids)], ids_BL[b, : len(ids)] = torch.tensor(numbers), torch.tensor(ids)
        mask_BL[b, 1 : len(ids)] = True
    return rollout_BL, ids_BL, mask_BL


def _heads(
    engine: AttachedEngine, model: Mirror, inputs: dict[str, Tensor], ids_BL: Tensor, mask_BL: Tensor
) -> dict[str, float] | None:
    weight = getattr(model.inner.get_output_embeddings(), "weight", None)
    if model.inner is not model.model or weight is None or not weight.numel() or hasattr(weight, "placements"):
        return None  # wrapped: the head's weight is whole inside a forward only
    hidden_BLD = model.inner.base_model(**inputs).last_hidden_state.to(engine.body_dtype)
    hidden_ND, ids_N = head_isolation.predicting(hidden_BLD.cpu(), ids_BL, mask_BL, limit=HEAD_TOKENS)
    return head_isolation.measure(
        engine, model.inner, hidden_ND, ids_N, temperature=1.0, shared=engine.shared, master_VD=model.status.master_VD
    )
