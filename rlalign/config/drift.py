"""The drift monitor of calibrated reward models: how much it remembers, what is too much, and what happens then."""

from __future__ import annotations

from dataclasses import dataclass

from rlalign.config.checks import positive, require

ACTIONS = ("warn", "stop")


@dataclass(kw_only=True)
class DriftConfig:
    """Every reward model with a calibration is watched: its logits against the verifier's word on the same samples."""

    every: int = 1  # steps between reports; 0: not watched
    window: int = 2000  # labelled samples that count, over all ranks
    min_labels: int = 200  # below it the state is insufficient_data, never ok
    bins: int = 15  # of the ECE
    right: float = 1.0  # a sample is right from this value of the verifier on
    gap: float = 0.05  # |E[p] - E[y]| that is drift, chance excluded; half of it is a warning
    tilt: float = 0.05  # half of the difference of that between high and low scores
    ece: float = 0.05  # debiased
    auroc: float = 0.1  # fall below the AUROC of the fit
    psi: float = 0.25  # of the scores against the fit; a warning, as scores may move for good reasons
    out_of_support: float = 0.05  # share of scores outside the fitted range; a warning
    action: str = "warn"  # on drift: warn | stop
    refit_every: int = (
        0  # steps after which the calibration is fitted again on the window, if it is the better one; 0: never
    )

    def __post_init__(self) -> None:
        positive(self, "reward.drift", "window", "bins", "gap", "tilt", "ece", "auroc", "psi", "out_of_support")
        require(
            2 <= self.min_labels <= self.window,
            f"reward.drift.min_labels={self.min_labels}: from 2 to reward.drift.window={self.window}",
        )
        require(self.every >= 0 and self.refit_every >= 0, "reward.drift.every and refit_every cannot be negative")
        require(
            self.every > 0 or self.refit_every == 0, "reward.drift.refit_every needs reward.drift.every of at least 1"
        )
        require(self.action in ACTIONS, f"reward.drift.action={self.action!r}: choose one of {', '.join(ACTIONS)}")
