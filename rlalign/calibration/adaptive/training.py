"""How a temperature head is trained, and the report of a fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass


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

    def as_json(self) -> dict[str, object]:
        """Plain lists and numbers."""
        lists = {"temperature_quantiles": list(self.temperature_quantiles), "rescaled": list(self.rescaled)}
        return asdict(self) | lists

    @classmethod
    def from_json(cls, content: dict[str, object]) -> AdaptiveFit:
        """Inverse of as_json. Raises TypeError on fields it does not know."""
        tuples = {name: tuple(content[name]) for name in ("temperature_quantiles", "rescaled")}
        return cls(**content | tuples)
