"""The optimisation of a reward model: rows to batches, one loss, AdamW; on one device, or on many through accelerate.

N rows or pairs of a micro-batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from rlalign.reward.training.examples import Pair, Row
from rlalign.reward.training.reward_network import RewardNetwork, padded

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator
    from torch import Tensor


def bradley_terry_loss(
    chosen_N: Tensor, rejected_N: Tensor, *, centring: float = 0.0, weights_N: Tensor | None = None
) -> Tensor:
    """Mean of weight * (-log sigmoid(chosen - rejected) + centring * (chosen + rejected)^2), in nats.

    Pairs say nothing about the level of the rewards; the second term keeps it near 0 (arXiv 2312.09244, Eq. 2; 0.01 there).
    weights_N: with mean 1 over the data set, so that batches add up. Raises ValueError on shapes that differ, no pairs, a
    negative centring or weight.
    """
    _require(chosen_N, rejected_N, weights_N, "bradley_terry_loss: chosen and rejected")
    if centring < 0:
        raise ValueError(f"bradley_terry_loss: centring cannot be negative, got {centring}")
    loss_N = -functional.logsigmoid(chosen_N - rejected_N) + centring * (chosen_N + rejected_N).square()
    return (loss_N if weights_N is None else weights_N * loss_N).mean()


def pointwise_loss(rewards_N: Tensor, labels_N: Tensor, *, weights_N: Tensor | None = None) -> Tensor:
    """Mean of weight * binary cross entropy of sigmoid(reward), in nats. labels_N: in [0, 1].

    weights_N: with mean 1 over the data set. Raises ValueError on shapes that differ, no rows, labels outside [0, 1], or a
    negative weight.
    """
    _require(rewards_N, labels_N, weights_N, "pointwise_loss: rewards and labels")
    if ((labels_N < 0) | (labels_N > 1)).any():
        raise ValueError(f"pointwise_loss: labels must lie in [0, 1], got {labels_N.min():g} to {labels_N.max():g}")
    return functional.binary_cross_entropy_with_logits(rewards_N, labels_N, weight=weights_N)


def _require(left_N: Tensor, right_N: Tensor, weights_N: Tensor | None, what: str) -> None:
    if left_N.shape != right_N.shape or left_N.ndim != 1 or len(left_N) == 0:
        raise ValueError(f"{what} must be [N] with N >= 1, got {tuple(left_N.shape)} and {tuple(right_N.shape)}")
    if weights_N is not None and (weights_N.shape != left_N.shape or (weights_N < 0).any()):
        raise ValueError(f"{what}: weights must be [N] and not negative, got shape {tuple(weights_N.shape)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a reward model is trained.

    batch_size: rows or pairs of one optimizer step, over all processes. micro_batch_size: of one forward pass.
    centring: keeps the level of the rewards near 0 when learning from pairs (arXiv 2312.09244).
    max_length: tokens; longer rows are left out and counted. chat_template: prompt and completion through the base's chat
    template, for the run to do the same. held_out: share of the prompts that is never trained on.
    """

    epochs: int = 1
    batch_size: int = 64
    micro_batch_size: int = 16
    learning_rate: float = 1e-5
    warmup: float = 0.05
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    centring: float = 0.01
    max_length: int = 2048
    chat_template: bool = False
    held_out: float = 0.1
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not (self.learning_rate > 0 and self.grad_clip > 0 and self.weight_decay >= 0 and self.centring >= 0):
            raise ValueError("learning_rate and grad_clip must be positive, weight_decay and centring not negative")
        if not (0 <= self.warmup < 1 and 0 < self.held_out < 1):
            raise ValueError(f"warmup={self.warmup} and held_out={self.held_out} are shares, between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A row with its token ids: of the completion, or of the chosen and the rejected one."""

    row: Row
    sequences: tuple[list[int], ...]


def fit(
    network: RewardNetwork,
    items: Sequence[Item],
    recipe: Recipe,
    accelerator: Accelerator,
    *,
    pad: int,
    say: Callable[[str], None],
) -> int:
    """Train `network` in place; the optimizer steps taken. accelerator: accumulates `accumulation(...)` micro-batches.

    Raises ValueError on fewer rows than a batch, RuntimeError when the loss is not finite.
    """
    if len(items) < recipe.batch_size:
        raise ValueError(f"{len(items)} rows to train on are fewer than batch_size={recipe.batch_size}")
    steps = recipe.epochs * (len(items) // recipe.batch_size)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    prepared, optimizer = accelerator.prepare(network, optimizer)
    prepared.train()
    mean_weight = sum(item.row.weight for item in items) / len(items)
    step, loss = 0, math.nan
    for batch in _micro_batches(items, recipe, accelerator.process_index, accelerator.num_processes):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, steps, recipe.warmup)
        with accelerator.accumulate(prepared):
            batch_loss = _loss(prepared, batch, recipe, mean_weight, pad=pad, device=accelerator.device)
            loss = float(batch_loss.detach())
            if not math.isfinite(loss):
                raise RuntimeError(f"step {step + 1}: the loss is {loss}; lower the learning rate or look at the data")
            accelerator.backward(batch_loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), recipe.grad_clip)
                step += 1
                if step % max(1, steps // 10) == 0:
                    say(f"step {step} of {steps}: loss {loss:.3f}")
            optimizer.step()
            optimizer.zero_grad()
    network.eval()
    return step


def accumulation(recipe: Recipe, processes: int) -> int:
    """Micro-batches of one optimizer step on each process. Raises ValueError where they do not make up batch_size."""
    together = recipe.micro_batch_size * processes
    if recipe.batch_size % together:
        raise ValueError(
            f"batch_size={recipe.batch_size} must be a multiple of micro_batch_size={recipe.micro_batch_size} x {processes} "
            "processes"
        )
    return recipe.batch_size // together


def _micro_batches(items: Sequence[Item], recipe: Recipe, rank: int, world: int) -> Iterator[list[Item]]:
    """This process's share of every batch. Each epoch has its own order, and leaves out the rows that fill no batch."""
    for epoch in range(recipe.epochs):
        order = list(range(len(items)))
        random.Random(f"{recipe.seed}/{epoch}").shuffle(order)
        for start in range(0, len(items) - recipe.batch_size + 1, recipe.batch_size):
            mine = order[start : start + recipe.batch_size][rank::world]
            for at in range(0, len(mine), recipe.micro_batch_size):
                yield [items[i] for i in mine[at : at + recipe.micro_batch_size]]


def _loss(
    network: torch.nn.Module,
    items: Sequence[Item],
    recipe: Recipe,
    mean_weight: float,
    *,
    pad: int,
    device: torch.device,
) -> Tensor:
    """One forward pass over all sequences of the micro-batch: for pairs the chosen ones first."""
    sides = list(zip(*(item.sequences for item in items), strict=True))
    rewards = network(*padded([ids for side in sides for ids in side], pad_token_id=pad, device=device))
    weights_N = torch.tensor([item.row.weight / mean_weight for item in items], device=device)
    if isinstance(items[0].row, Pair):
        chosen_N, rejected_N = rewards.chunk(2)
        return bradley_terry_loss(chosen_N, rejected_N, centring=recipe.centring, weights_N=weights_N)
    labels_N = torch.tensor([item.row.label for item in items], device=device)
    return pointwise_loss(rewards, labels_N, weights_N=weights_N)


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over that share of the steps, then a cosine down to a tenth."""
    rising = min(1.0, (step + 1) / max(1, round(warmup * steps)))
    return rising * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * step / steps)))
