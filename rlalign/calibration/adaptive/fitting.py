"""Training a temperature head, and the clip between its raw output and the scale of the logits.

N scored tokens or rows of a batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rlalign.calibration.adaptive.batches import Batch, Batches, Level
from rlalign.calibration.adaptive.heads import TemperatureHead
from rlalign.calibration.adaptive.sums import Facts, Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How the head is trained: AdamW over the batches in a seeded order, cosine to zero.

    epochs: raised where the batches are so few that there would be less than `least_steps` steps.
    learning_rate: None for 1e-3 (MLP, decoder layer) or 1e-2. weight_decay: on matrices, not on biases.
    With validation batches the epoch with the lowest loss there is kept, epoch 0 (T = 1) included; then its raw output is
    scaled and shifted, two numbers, to lower that loss further: a head that has learnt its fitted tokens by heart
    spreads its temperatures too far, and one that has learnt nothing is left as the best single temperature.
    """

    epochs: int = 10
    least_steps: int = 300
    learning_rate: float | None = None
    weight_decay: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        rate = 1.0 if self.learning_rate is None else self.learning_rate
        if min(self.epochs, self.least_steps) < 1 or not rate > 0 or not self.weight_decay >= 0:
            raise ValueError(
                f"Training: epochs, least_steps, learning_rate must be positive, weight_decay not negative: {self}"
            )

    def rounds(self, batches: int) -> int:
        """The number of epochs over so many batches."""
        return max(self.epochs, -(-self.least_steps // batches))

    def rate(self, kind: str) -> float:
        """The learning rate for a head."""
        return self.learning_rate or (1e-3 if kind in ("mlp", "transformer") else 1e-2)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveFit:
    """What a fit saw and achieved. Losses are the objective's, nats per token.

    n: scored tokens (rows). accuracy: share whose top token is the right one. loss_before: at T = 1. epoch: the one
    kept, 0 when none was better than T = 1 on the validation batches. rescaled: (factor, shift) of the raw output, (1, 0)
    without validation batches. validation_after is optimistic by that choice. temperature_quantiles: minimum, quartiles and
    maximum over the fitted tokens. clipped: share of them at the ends of the declared range. kendall_tau: for two
    classes, so for scalar rewards, agreement of the order of responses before and after; 1 when none changed places.
    """

    n: int
    n_validation: int
    accuracy: float
    loss_before: float
    loss_after: float
    validation_before: float | None
    validation_after: float | None
    epoch: int
    rescaled: tuple[float, float]
    temperature_quantiles: tuple[float, ...]
    clipped: float
    kendall_tau: float | None = None

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> AdaptiveFit:
        """Inverse of `asdict` after a trip through JSON. Raises TypeError on fields it does not know."""
        tuples: dict[str, Any] = {name: tuple(content[name]) for name in ("temperature_quantiles", "rescaled")}
        return cls(**content | tuples)


Output = Literal["log_inverse_temperature", "log_temperature"]
OUTPUTS = ("log_inverse_temperature", "log_temperature")


class _InwardClip(torch.autograd.Function):
    """Clip to [low, high] whose gradient vanishes only where a step would leave the range.

    A plain clamp has no gradient outside at all: a token that has left would never come back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ends = (low, high)
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad,), (x,), (low, high) = grad_outputs, ctx.saved_tensors, ctx.ends
        outward = ((x > high) & (grad < 0)) | ((x < low) & (grad > 0))
        return grad.masked_fill(outward, 0.0), None, None


def scale_of(raw: Tensor, bounds: tuple[float, float], output: Output) -> Tensor:
    """The inverse temperature, exp of the head's raw output (or of its negative), with T clipped to `bounds`."""
    log_scale = raw if output == "log_inverse_temperature" else -raw
    return torch.exp(_InwardClip.apply(log_scale, -math.log(bounds[1]), -math.log(bounds[0])))


@torch.no_grad()
def standardise(head: TemperatureHead, batches: Batches[Batch]) -> None:
    """Set the head's centre and unit to mean and standard deviation of the hidden states it will read."""
    count, total_D = 0, torch.zeros_like(head.centre_D, dtype=torch.float64)
    square_D = total_D
    for batch in (batches[i] for i in range(len(batches))):
        x_ND = batch.states().double()
        count, total_D, square_D = count + len(x_ND), total_D + x_ND.sum(0), square_D + x_ND.square().sum(0)
    mean_D = total_D / count
    spread_D = (square_D / count - mean_D**2).clamp_min(0.0).sqrt()
    least = max(1e-3 * float(spread_D.max()), 1e-12)  # a constant dimension says nothing; it must not be blown up
    head.centre_D.copy_(mean_D)
    head.unit_D.copy_(spread_D.clamp_min(least))


@dataclass(slots=True)
class Fitting:
    """One fit: the head that is trained, and how its output becomes a scale."""

    head: TemperatureHead
    objective: Objective
    training: Training
    bounds: tuple[float, float]
    level: Level
    output: Output

    def run(self, batches: Batches[Batch], validation: Batches[Batch], progress: Callable[[str], None]) -> AdaptiveFit:
        """Train, put the best epoch's parameters into the head, and say what came of it.

        Raises RuntimeError on a loss that is not finite, and when a batch changes between epochs.
        """
        facts, held = ([each[i].facts() for i in range(len(each))] for each in (batches, validation))
        accuracy = float(torch.cat([each.right_N for each in facts]).float().mean())
        before = self._mean_loss(batches, facts, accuracy)
        held_before = self._mean_loss(validation, held, accuracy) if held else None
        best, epoch = held_before, 0 if held else self.training.rounds(len(batches))
        kept = copy.deepcopy(self.head.state_dict())
        optimizer, schedule = self._optimizer(len(batches))
        order = torch.Generator().manual_seed(self.training.seed)
        epochs = self.training.rounds(len(batches))
        for at in range(1, epochs + 1):
            self._epoch(batches, facts, accuracy, optimizer, schedule, order)
            if best is None:
                progress(f"epoch {at} of {epochs}")
                continue
            now = self._mean_loss(validation, held, accuracy)
            progress(f"epoch {at} of {epochs}: validation loss {now:.4f}, at T = 1 {held_before:.4f}")
            if now < best:
                best, epoch, kept = now, at, copy.deepcopy(self.head.state_dict())
        rescaled = (1.0, 0.0)
        if held:
            self.head.load_state_dict(kept)
            rescaled = self._rescale(validation, held, accuracy)
            best = self._mean_loss(validation, held, accuracy)
        with torch.no_grad():
            temperature_N = torch.cat([1.0 / self.scale(batches[i]).double() for i in range(len(facts))]).cpu()
        log_N, ends = temperature_N.log(), [math.log(end) for end in self.bounds]
        return AdaptiveFit(
            n=len(temperature_N),
            n_validation=sum(len(each.right_N) for each in held),
            accuracy=accuracy,
            loss_before=before,
            loss_after=self._mean_loss(batches, facts, accuracy),
            validation_before=held_before,
            validation_after=best,
            epoch=epoch,
            rescaled=rescaled,
            temperature_quantiles=tuple(np.quantile(temperature_N.numpy(), [0, 0.25, 0.5, 0.75, 1]).tolist()),
            clipped=float(((log_N <= ends[0] + 1e-6) | (log_N >= ends[1] - 1e-6)).double().mean()),
        )

    def scale(self, batch: Batch) -> Tensor:
        """The inverse temperature of each thing in the batch, [N]."""
        return scale_of(batch.pick(self.head(batch.hidden), self.level), self.bounds, self.output)

    def _epoch(
        self,
        batches: Batches[Batch],
        facts: list[Facts],
        accuracy: float,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        order: torch.Generator,
    ) -> None:
        per_batch = sum(len(each.right_N) for each in facts) / len(batches)
        for i in torch.randperm(len(batches), generator=order).tolist():
            loss = self._losses(batches[i], facts[i], accuracy).sum() / per_batch  # every token counts the same
            if not bool(loss.isfinite()):
                raise RuntimeError(
                    f"adaptive temperature: the loss of batch {i} is {float(loss.detach())}; lower training.learning_rate"
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
            optimizer.step()
            schedule.step()

    def _losses(self, batch: Batch, facts: Facts, accuracy: float) -> Tensor:
        if len(batch) != len(facts.right_N):
            raise RuntimeError(
                f"adaptive temperature: a batch has {len(batch)} scored tokens and had {len(facts.right_N)} before; "
                "batches[i] must give the same batch every time"
            )
        scale_N = self.scale(batch)
        return self.objective.per_token(batch.rest(scale_N, facts), scale_N, facts, accuracy)

    def _rescale(self, batches: Batches[Batch], facts: list[Facts], accuracy: float) -> tuple[float, float]:
        """The factor and shift of the raw output with the lowest loss on these batches, put into the last layer.

        Not a negative factor: what holds the other way round has not been learnt. Then it is 0, one temperature.
        """
        with torch.no_grad():
            raw = [batches[i].pick(self.head(batches[i].hidden), self.level) for i in range(len(facts))]
        tokens = sum(len(each) for each in raw)

        def loss_at(factor: Tensor, shift: Tensor) -> Tensor:
            total = torch.zeros((), device=raw[0].device)
            for i, raw_N in enumerate(raw):
                scale_N = scale_of(factor * raw_N + shift, self.bounds, self.output)
                loss_N = self.objective.per_token(batches[i].rest(scale_N, facts[i]), scale_N, facts[i], accuracy)
                total = total + loss_N.sum() / tokens
            return total

        factor, shift = torch.ones((), device=raw[0].device), torch.zeros((), device=raw[0].device)
        before = float(loss_at(factor, shift))
        _minimise(lambda: loss_at(factor, shift), [factor, shift])
        if float(factor) < 0.0:
            factor, shift = torch.zeros_like(factor), torch.zeros_like(shift)
            _minimise(lambda: loss_at(factor, shift), [shift])
        if not float(loss_at(factor, shift)) < before:
            return 1.0, 0.0
        with torch.no_grad():
            self.head.linear.weight.mul_(factor)
            self.head.linear.bias.mul_(factor).add_(shift)
        return float(factor), float(shift)

    @torch.no_grad()
    def _mean_loss(self, batches: Batches[Batch], facts: list[Facts], accuracy: float) -> float:
        total = sum(float(self._losses(batches[i], facts[i], accuracy).double().sum()) for i in range(len(facts)))
        return total / sum(len(each.right_N) for each in facts)

    def _optimizer(self, batches: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        matrices = [p for p in self.head.parameters() if p.dim() > 1 and p.requires_grad]
        vectors = [p for p in self.head.parameters() if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.training.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.training.rate(self.head.shape.kind))
        steps = self.training.rounds(batches) * batches
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _minimise(loss: Callable[[], Tensor], parameters: list[Tensor]) -> None:
    """Move a few numbers to the lowest loss (L-BFGS); they need no gradient before or after."""
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.LBFGS(parameters, max_iter=25, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    for parameter in parameters:
        parameter.requires_grad_(False)
