"""What rounding alone does: the trainer's body in its own dtype against the same weights in float32, on the same tokens.

Two engines that are both right each round on their own, so they are about as far from each other as each is from float32. That,
and not a constant, is the bar for a bf16 model: it grows with depth and with the scale of the logits.
Suffixes: B sequences, L padded length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign import mismatch
from rlalign.rollout.engine.noise_floor import FEW, KEPT
from rlalign.types import RolloutBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# independent errors of one size give 1.4 and 2, opposite ones 2 and 4; k3 has a long tail
TIMES_MEAN, TIMES_K3 = 3.0, 9.0
FLOAT32 = {"rounding_k3": 1e-9, "rounding_abs_mean": 1e-5}  # nats: more than summing in another order does in float32
HEAD_SHARE = 0.05  # of the error of a bf16 head: float32 ones measure 3e-5 to 4e-4 of it, bf16 ones 1


def measure(
    network: PreTrainedModel,
    batch: RolloutBatch,
    own_BL: Tensor,
    rollout_BL: Tensor,
    score: Callable[[RolloutBatch], Tensor],
) -> dict[str, float]:
    """{"rounding_k3", "rounding_abs_mean", "rollout_rounding_abs_mean"} of the first sequences of a batch, nats per token.

    own_BL, rollout_BL: the two sides' logprobs. score: the trainer's logprobs of a batch through `network` as it then is. The
    first two compare the trainer with itself in float32, the last one the rollout engine with the trainer in float32. A float32
    body has nothing wider here: its two are FLOAT32, its third is the two sides' difference.
    """
    few = batch.rows(slice(0, FEW))
    if network.get_input_embeddings().weight.dtype == torch.float32:
        wide_BL, own = own_BL[:FEW], FLOAT32
    else:
        with in_float32(network):
            wide_BL = score(few)
        compared = _compare(own_BL[:FEW], wide_BL, few)
        own = {"rounding_k3": compared["k3"], "rounding_abs_mean": compared["abs_mean"]}
    return own | {"rollout_rounding_abs_mean": _compare(rollout_BL[:FEW], wide_BL, few)["abs_mean"]}


@contextmanager
def in_float32(network: PreTrainedModel) -> Iterator[None]:
    """The network's own weights in float32 meanwhile, and bit for bit as they were afterwards.

    In place, so that at no time two copies are held. Buffers stay: rotary frequencies are float32 already.
    """
    before = {parameter: parameter.dtype for parameter in network.parameters()}
    try:
        for parameter in before:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in before.items():
            parameter.data = parameter.data.to(dtype)


def over(measured: Mapping[str, float]) -> str:
    """What is larger than rounding explains, in words; empty where nothing is. NaN is larger than anything.

    measured: k3 and abs_mean of two sides with equal float32 or master heads, `rounding_*` and, where known, `floor_*`.
    """
    k3, mean = limits(measured)
    if measured["k3"] <= k3 and measured["abs_mean"] <= mean:
        return ""
    further = measured["rollout_rounding_abs_mean"] / measured["rounding_abs_mean"]
    side = f"; the rollout engine is {further:.1f} times as far from the float32 body as the trainer" * (further > 2)
    return (
        f"k3 = {measured['k3']:.3g}, mean |log_ratio| = {measured['abs_mean']:.3g} nats/token is more than rounding explains "
        f"(up to {k3:.2g} and {mean:.2g} for this model){side}"
    )


def limits(measured: Mapping[str, float]) -> tuple[float, float]:
    """(k3, mean |log_ratio|) up to which rounding, or the engine's own noise, explains a difference."""
    k3 = max(measured["rounding_k3"], measured.get("floor_k3", 0.0))
    mean = max(measured["rounding_abs_mean"], measured.get("floor_abs_mean", 0.0))
    return TIMES_K3 * k3, TIMES_MEAN * mean


def heads_over(measured: Mapping[str, float], limit: float | None = None) -> str:
    """Which side's head alone is further from float64 than float32 rounding; empty where none is.

    measured: as `head_isolation.measure` gives it. limit: mean nats; by default a twentieth of what a bf16 head would be off.
    """
    bar = HEAD_SHARE * measured["bf16_error"] if limit is None else limit
    sides = {"rollout": measured["rollout_error"], "trainer": measured["trainer_error"]}
    return "; ".join(
        f"the {side}'s head is {error:.2g} nats from the float64 head (limit {bar:.1g}): it does not multiply in float32"
        for side, error in sides.items()
        if not error <= bar
    )


def _compare(one_BL: Tensor, other_BL: Tensor, few: RolloutBatch) -> dict[str, float]:
    return mismatch.compare(one_BL, other_BL, few.loss_mask_BL, positions=False)


EXTRA, CHUNK = 37, 7  # columns of padding; tokens of a tile of the head
Score = Callable[..., Tensor]
Sources = dict[str, dict[str, float] | None]


def trainer_floor(score: Score, batch: RolloutBatch) -> Sources:
    """Mismatch of the trainer with itself by source, with the keys of `noise_floor.KEPT` (nats).

    The same weights and tokens, gone through in other ways that must not matter in exact arithmetic. Beside the engine's own floor
    (`rollout.engine.noise_floor`): what a mismatch has to exceed is both together.
    score(batch, rows=0, chunk=0, exact=True) -> [B, L] logprobs: `rows` sequences in one forward (0: all), the head in tiles of
    `chunk` tokens (0: its own), exact: as old_logprobs are computed, otherwise as those with a gradient.
    trainer_batch_of_one: each sequence alone and without padding; trainer_padding: behind more of it; trainer_tiles: the head in
    other tiles; trainer_update: the pass that is differentiated. The first `noise_floor.FEW` sequences.
    """
    few = batch.rows(slice(0, FEW))
    whole_BL = score(few)
    alone_BL = torch.zeros_like(whole_BL)
    for row, length in enumerate(few.attention_mask_BL.sum(1).tolist()):
        alone_BL[row, :length] = score(few.rows(slice(row, row + 1), length))[0]
    others = {
        "trainer_batch_of_one": alone_BL,
        "trainer_padding": score(_padded(few))[:, : whole_BL.shape[1]],
        "trainer_tiles": score(few, chunk=CHUNK),
        "trainer_update": score(few, exact=False),
    }
    return {name: _kept(whole_BL, other_BL, few.loss_mask_BL) for name, other_BL in others.items()}


def with_trainer_floor(engine: Sources, trainer: Sources) -> Sources:
    """All sources, with `floor` the engine's worst plus the trainer's worst for each key.

    Two independent noises add at most so: |d| by the triangle inequality, k1 and k3 to first order.
    """
    floor = engine["floor"]
    assert floor is not None
    worst = {key: max(abs(source[key]) for source in trainer.values() if source is not None) for key in KEPT}
    apart = {name: source for name, source in engine.items() if name != "floor"}
    return apart | trainer | {"floor": {key: floor[key] + worst[key] for key in KEPT}}


def _kept(one_BL: Tensor, other_BL: Tensor, mask_BL: Tensor) -> dict[str, float]:
    measured: Mapping[str, float] = mismatch.compare(one_BL, other_BL, mask_BL, positions=False)
    return {key: measured[key] + 0.0 for key in KEPT}  # + 0.0: no minus sign before a zero


def _padded(batch: RolloutBatch) -> RolloutBatch:
    """The same sequences behind more padding; pad ids are attended to by nobody."""
    wider = {
        name: torch.nn.functional.pad(tensor, (0, EXTRA)) if tensor.dim() == 2 else tensor
        for name, tensor in batch.tensors().items()
    }
    return replace(batch, **wider, kept=None, spec=batch.spec)
