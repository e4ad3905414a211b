"""The reward of a step's samples: the task's verifier and reward models, each shaped, then added up with their weights.

A sample for which a component has no number has no reward: NaN and a reason, never 0.0. It then leaves its group's statistics
and the loss. B samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from rlalign.config.reward import VERIFIER
from rlalign.reward.shaping import tied_share
from rlalign.types import RewardScore

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion. verified: what the task's verifier says, NaN where it said nothing, and unverified then says why; group:
    equal for completions of one prompt; tokens: sampled.
    """

    prompt: str
    completion: str
    verified: float
    group: int
    tokens: int
    unverified: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentScore:
    """What one component says. score: NaN where it says nothing; failed: sample -> why; measured: its own extra metrics."""

    score: RewardScore
    failed: Mapping[int, str] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)


class Component(Protocol):
    """Anything that scores samples; see `model_reward.ModelReward`."""

    def __call__(self, samples: Sequence[Sample]) -> ComponentScore: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """values_B: [B] float32, NaN without a reward; group_B: [B] int64.

    components: by name; `score.raw` is the logit (or 0 and 1 of the verifier), `score.calibrated` what is weighted and added.
    failed: sample -> why it has no reward.
    """

    values_B: Tensor
    group_B: Tensor
    components: Mapping[str, ComponentScore]
    failed: Mapping[int, str]

    @property
    def known_B(self) -> Tensor:
        """[B] bool: samples that have a reward."""
        return ~self.values_B.isnan()

    def metrics(self) -> dict[str, float]:
        """reward/*: of the sum, and reward/COMPONENT/* of every component. NaN where no sample has a number.

        frac_zero_std_groups: groups without two different rewards teach nothing; left out where every group has one sample.
        """
        known_N = self.values_B[self.known_B]
        found = {
            "mean": float(known_N.mean()),
            "std": float(known_N.std(correction=0)),
            "failed": float(len(self.failed)),
        }
        if len(self.group_B.unique()) < len(self.group_B):
            found["frac_zero_std_groups"] = self._same_reward_share()
        for name, component in self.components.items():
            found |= {f"{name}/{key}": value for key, value in self._of(component).items()}
        return {f"reward/{key}": value for key, value in found.items()}

    def _same_reward_share(self) -> float:
        """Share of the groups whose known rewards are all equal, or none known."""
        group_B = self.group_B.unique(return_inverse=True)[1]
        start_G = self.values_B.new_full((int(group_B.max()) + 1,), float("inf"))
        known = (0, group_B[self.known_B], self.values_B[self.known_B])
        low_G, high_G = start_G.scatter_reduce(*known, "amin"), (-start_G).scatter_reduce(*known, "amax")
        return int((high_G <= low_G).sum()) / len(start_G)

    def _of(self, component: ComponentScore) -> dict[str, float]:
        known_B = ~component.score.calibrated.isnan()
        raw_N, calibrated_N = component.score.raw[known_B], component.score.calibrated[known_B]
        found = {
            "mean": float(calibrated_N.mean()),
            "std": float(calibrated_N.std(correction=0)),
            "failed": float(len(component.failed)),
        }
        if component.score.raw is not component.score.calibrated:
            found |= {
                "raw_mean": float(raw_N.mean()),
                "raw_std": float(raw_N.std(correction=0)),
                "tied_frac": tied_share(raw_N, calibrated_N, self.group_B[known_B].tolist()),
            }
        return found | dict(component.measured)

    def describe_failed(self) -> str:
        """One line: how many samples have no reward, and the most frequent reasons."""
        reasons = Counter(self.failed.values()).most_common(3)
        return f"{len(self.failed)} of {len(self.values_B)} samples have no reward: " + "; ".join(
            f"{reason} ({count})" for reason, count in reasons
        )


class RewardMixture:
    """Adds up weight * score over the verifier and the models. Without models: the verifier alone.

    weights: by component; a component of weight 0 is scored and logged, and cannot fail a sample.
    max_failed: share of a step's samples without a reward above which a step raises RuntimeError.
    """

    def __init__(
        self,
        models: Mapping[str, Component] | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        max_failed: float = 0.5,
    ) -> None:
        self.models = dict(models or {})
        self.weights = {VERIFIER: 1.0} if weights is None else dict(weights)
        self.max_failed = max_failed

    def __call__(self, samples: Sequence[Sample]) -> Rewards:
        """Score every sample. Raises RuntimeError when too many have no reward: a broken scorer must not be trained on."""
        import torch

        components = {VERIFIER: _verified(samples)} | {name: model(samples) for name, model in self.models.items()}
        values_B = torch.zeros(len(samples), dtype=torch.float64)
        failed: dict[int, str] = {}
        for name, component in components.items():
            if weight := self.weights.get(name, 0.0):
                values_B += weight * component.score.calibrated.double()
                failed |= {at: f"{name}: {why}" for at, why in component.failed.items() if at not in failed}
        rewards = Rewards(
            values_B=values_B.float(),
            group_B=torch.tensor([s.group for s in samples]),
            components=components,
            failed=dict(sorted(failed.items())),
        )
        _require_reasons(rewards)
        if len(failed) > self.max_failed * len(samples):
            raise RuntimeError(
                f"reward: {rewards.describe_failed()}; expected at most a share of reward.max_failed={self.max_failed}. Nothing "
                "was trained on this step. Repair the scorer, or raise the limit to go on with the rest"
            )
        return rewards


def _verified(samples: Sequence[Sample]) -> ComponentScore:
    import torch

    verified_B = torch.tensor([s.verified for s in samples], dtype=torch.float32)
    failed = {
        at: s.unverified or "the verifier gave no number" for at, s in enumerate(samples) if math.isnan(s.verified)
    }
    return ComponentScore(score=RewardScore(raw=verified_B, calibrated=verified_B), failed=failed)


def _require_reasons(rewards: Rewards) -> None:
    """Every sample without a reward has a reason, and no other. Raises RuntimeError: a component broke its contract."""
    missing = set((~rewards.known_B).nonzero()[:, 0].tolist())
    if missing != set(rewards.failed) or rewards.values_B.isinf().any():
        raise RuntimeError(
            f"reward: samples {sorted(missing ^ set(rewards.failed))} have a NaN without a reason, or a reason beside a number; "
            "a component must answer every sample with one finite number or one reason"
        )
