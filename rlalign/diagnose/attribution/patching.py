"""Logprob attribution: what is left of the difference in logprobs once the trainer goes on from the rollout's activation.

The cuts follow the residual stream: after the embedding, after each attention, after each layer, after the last norm, at the
logits. A cut replaces everything before it, so the differences between successive cuts add up to the whole.
Suffixes: B sequences, L padded length, N scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign.diagnose.attribution.mapping import EMBED, FINAL_NORM, LOGITS, ModelMap
from rlalign.diagnose.attribution.trainer_side import LOGIT_ELEMENTS, Side, substitute, visited
from rlalign.diagnose.both_sides import head_logprobs
from rlalign.rollout.worker.recording import POSITION, SEQUENCE, Recording
from rlalign.types import RolloutBatch

LOGPROBS = "logprobs"


@dataclass(frozen=True, slots=True)
class Cut:
    """A place where the trainer goes on from the rollout's activations. skip: leading layers that need not run."""

    name: str
    points: tuple[str, ...]
    skip: int


@dataclass(frozen=True, slots=True)
class Removed:
    """One cut. remaining: mean |delta logp| with it (nats); share: its part of the whole squared difference; shares sum to 1."""

    cut: str
    remaining: float
    share: float


def cuts(mapping: ModelMap) -> list[Cut]:
    """In the order of computation."""
    found, known = [Cut(EMBED, (EMBED,), 0)], set(mapping.points())
    for layer in range(mapping.layers):
        before = f"layers.{layer - 1}.residual" if layer else EMBED
        if f"layers.{layer}.attn_out" in known:
            found.append(Cut(f"layers.{layer}.attn_out", (before, f"layers.{layer}.attn_out"), layer))
        found.append(Cut(f"layers.{layer}.residual", (f"layers.{layer}.residual",), layer + 1))
    return [*found, Cut(FINAL_NORM, (FINAL_NORM,), mapping.layers)]


@torch.no_grad()
def logprobs(side: Side, batch: RolloutBatch, *, head_dtype: str, temperature: float) -> Tensor:
    """[B, L]: the trainer's own, in the same micro-batches as the patched passes."""
    return _logprobs(side, batch, None, (), 0, head_dtype, temperature)


@torch.no_grad()
def attribute(
    side: Side,
    batch: RolloutBatch,
    rollout: Recording,
    rollout_BL: Tensor,
    own_BL: Tensor,
    *,
    head_dtype: str,
    temperature: float,
) -> list[Removed]:
    """Every cut. rollout_BL, own_BL: logprobs of the two sides (nats).

    The last entry is the logprob itself: what is left when the trainer normalises the rollout's own logits.
    """
    mask_BL = batch.loss_mask_BL
    deltas = {}
    for cut in cuts(side.mapping):
        patched_BL = _logprobs(side, batch, rollout, cut.points, cut.skip, head_dtype, temperature)
        deltas[cut.name] = (patched_BL - rollout_BL)[mask_BL].double()
    deltas[LOGITS] = (from_logits(rollout, batch, temperature, torch.float32) - rollout_BL)[mask_BL].double()
    whole_N = (own_BL - rollout_BL)[mask_BL].double()
    return removed(whole_N, deltas | {LOGPROBS: torch.zeros_like(whole_N)})


def removed(whole_N: Tensor, deltas: dict[str, Tensor]) -> list[Removed]:
    """Shares by projection: of the token-wise step between two cuts, the part along the whole difference. They sum to 1.

    Where the two sides agree in every token there is nothing to share, and every share is 0.
    """
    total, before_N, found = float(whole_N.square().sum()), whole_N, []
    for name, after_N in deltas.items():
        share = float(((before_N - after_N) * whole_N).sum()) / total if total else 0.0
        found.append(Removed(name, float(after_N.abs().mean()), share))
        before_N = after_N
    return found


def _logprobs(
    side: Side,
    batch: RolloutBatch,
    rollout: Recording | None,
    points: Sequence[str],
    skip: int,
    head_dtype: str,
    temperature: float,
) -> Tensor:
    pairs = [side.mapping.pair(point) for point in points]
    rows, device, found = side.rows or len(batch), next(side.network.parameters()).device, []
    for first in range(0, len(batch), rows):
        part = batch.rows(slice(first, first + rows))
        sequences = range(first, first + len(part))

        def visit(point: str, value_BLD: Tensor, sequences: range = sequences) -> Tensor:
            return substitute(rollout, point, value_BLD, sequences)

        with _skipped(side, skip), visited(side.network, pairs, tuple(part.token_ids_BL.shape), visit):
            body = side.network.base_model(
                input_ids=part.token_ids_BL.to(device),
                attention_mask=part.attention_mask_BL.to(device),
                use_cache=False,
            )
        found.append(head_logprobs(side.network, body.last_hidden_state, part, head_dtype, temperature=temperature))
    return torch.cat(found)


@contextmanager
def _skipped(side: Side, count: int) -> Iterator[None]:
    """The first `count` layers hand their input on: what they make would be replaced anyway."""
    modules = [side.network.get_submodule(f"{side.mapping.trainer_layers}.{i}") for i in range(count)]
    for module in modules:
        module.forward = _hand_on_in_a_tuple if side.mapping.tuples else _hand_on
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _hand_on(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    return hidden_states


def _hand_on_in_a_tuple(hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor]:
    return (hidden_states,)


def from_logits(recording: Recording, batch: RolloutBatch, temperature: float, dtype: torch.dtype) -> Tensor:
    """[B, L]: logprobs of the scored tokens by normalising recorded logits in this dtype (nats, 0.0 elsewhere)."""
    table_N3, width = recording.table(LOGITS), recording.width(LOGITS)
    found_BL = torch.zeros(batch.token_ids_BL.shape, dtype=dtype)
    asked_BL = torch.nn.functional.pad(batch.loss_mask_BL[:, 1:], (0, 1))
    rows_N = asked_BL[table_N3[:, SEQUENCE], table_N3[:, POSITION]].nonzero()[:, 0]
    for rows in rows_N.split(max(1, LOGIT_ELEMENTS // width)):
        sequence_N, position_N = table_N3[rows, SEQUENCE], table_N3[rows, POSITION] + 1
        logprobs_NV = (recording.read(LOGITS, rows, width=width).to(dtype) / temperature).log_softmax(-1)
        ids_N = batch.token_ids_BL[sequence_N, position_N]
        found_BL[sequence_N, position_N] = logprobs_NV.gather(1, ids_N[:, None])[:, 0]
    return found_BL
