"""The reward of a step's samples: the task's verifier and reward models, each shaped, then added up with their weights.

A sample for which a component has no number has no reward: NaN and a reason, never 0.0. It then leaves its group's statistics
and the loss. B samples, N of them with a score.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import numpy as np

from rlalign.config.reward import VERIFIER
from rlalign.reward.shaping import BootstrapCalibration, centred_sigmoid, tied_share, without_length_bias
from rlalign.types import RewardScore

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from rlalign.calibration.arrays import Floats
    from rlalign.calibration.calibrators import Calibrator
    from rlalign.calibration.calibrators.methods import AffineCalibrator
    from rlalign.config import RewardModelConfig
    from rlalign.scoring.params import ScoringParams
    from rlalign.scoring.result import ScoreResult
    from rlalign.scoring.scorer import Scoring

    Score = Callable[[Sequence[tuple[str, str]]], Sequence[float | str]]


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
    """Anything that scores samples; see `ModelReward`."""

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
        found = _spread(known_N) | {"failed": float(len(self.failed))}
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
        found = _spread(calibrated_N) | {"failed": float(len(component.failed))}
        if component.score.raw is not component.score.calibrated:
            found |= _spread(raw_N, "raw_")
            found["tied_frac"] = tied_share(raw_N, calibrated_N, self.group_B[known_B].tolist())
        return found | dict(component.measured)

    def describe_failed(self) -> str:
        """One line: how many samples have no reward, and the most frequent reasons."""
        reasons = Counter(self.failed.values()).most_common(3)
        return f"{len(self.failed)} of {len(self.values_B)} samples have no reward: " + "; ".join(
            f"{reason} ({count})" for reason, count in reasons
        )


def _spread(values_N: Tensor, prefix: str = "") -> dict[str, float]:
    return {f"{prefix}mean": float(values_N.mean()), f"{prefix}std": float(values_N.std(correction=0))}


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


EMPTY = "the completion is empty"


def logits_by(
    scorer: Scoring, params: ScoringParams | None = None, *, label_index: int | None = None, chat: bool = False
) -> Score:
    """Raw logits of (prompt, completion) pairs, or the reason for which there is none; all pairs in one run of the scorer.

    chat: through the chat template of the reward model, else one text after the other. A generative judge's logit is the log-odds
    of its first label against the second. Raises ValueError where the model gives more than one number a completion and
    label_index does not say which.
    """

    def score(pairs: Sequence[tuple[str, str]]) -> list[float | str]:
        prompts = [[{"role": "user", "content": p}] if chat else p for p, _ in pairs]
        completions = [[{"role": "assistant", "content": c}] if chat else c for _, c in pairs]
        result = scorer.score_conversations(prompts, completions, params)
        return [error or _logit(result, i, label_index) for i, error in enumerate(result.errors)]

    return score


def _logit(result: ScoreResult, i: int, label_index: int | None) -> float:
    logits = result.logits[i]
    if logits is None or logits.ndim != 1:
        shape = getattr(result.scores[i], "shape", ())
        raise ValueError(
            f"{result.model}: a reward is one number a completion, but the scores have shape {shape}; "
            "use a sequence classifier or a generative judge"
        )
    if result.label_mass is not None:
        if len(logits) != 2:
            raise ValueError(
                f"{result.model}: a judge's reward is the log-odds of two labels, yes first, and label_token_ids has {len(logits)}"
            )
        return float(logits[0] - logits[1])
    if logits.shape != (1,) and label_index is None:
        raise ValueError(
            f"{result.model}: {len(logits)} logits a completion; say which one is the reward with label_index"
        )
    return float(logits[label_index or 0])


T = TypeVar("T")


def _needed(part: T | None, what: str) -> T:
    if part is None:
        raise RuntimeError(f"this shape needs a {what}, and the reward was made without one")
    return part


@dataclass
class ModelReward:
    """One reward model. `calibrator` may be replaced between steps; every score carries the id of the one that made it.

    score: raw logits of (prompt, completion) pairs, or the reason for which there is none.
    calibrator, bootstrap, references (prompt -> scores of the initial policy's completions): whatever config.shape needs, see
    `rlalign.config.reward`.
    """

    config: RewardModelConfig
    score: Score
    calibrator: Calibrator | None = None
    bootstrap: BootstrapCalibration | None = None
    references: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self, samples: Sequence[Sample]) -> ComponentScore:
        """Score, correct for length, shape, filter. Each pair of prompt and completion is scored once."""
        import torch

        raw, failed = self._raw(samples)
        known = np.flatnonzero(~np.isnan(raw))
        logits_N = raw[known]
        if self.config.length_correction and len(known):
            lengths = [samples[i].tokens for i in known]
            logits_N = without_length_bias(logits_N, lengths, strength=self.config.length_correction)
        value = np.full(len(samples), math.nan)
        value[known] = self._shape(logits_N, [samples[i].prompt for i in known])
        left_out = known[self._unsure(logits_N)].tolist()
        value[left_out] = math.nan
        failed |= dict.fromkeys(left_out, f"its probability is inside unsure={self.config.unsure}")
        score = RewardScore(
            raw=torch.tensor(raw, dtype=torch.float32),
            calibrated=torch.tensor(value, dtype=torch.float32),
            calibration_id="identity" if self.calibrator is None else self.calibrator.calibration_id,
        )
        return ComponentScore(score=score, failed=failed, measured=self._measured(logits_N, filtered=len(left_out)))

    def _raw(self, samples: Sequence[Sample]) -> tuple[Floats, dict[int, str]]:
        pairs = list(dict.fromkeys((s.prompt, s.completion) for s in samples if s.completion))
        answers = dict(zip(pairs, self.score(pairs), strict=True)) if pairs else {}
        raw, failed = np.full(len(samples), math.nan), {}
        for at, sample in enumerate(samples):
            empty = EMPTY if self.config.empty is None else self.config.empty
            answer = answers[sample.prompt, sample.completion] if sample.completion else empty
            if self.references and sample.prompt not in self.references:
                answer = "no reference for its prompt"
            if isinstance(answer, str):
                failed[at] = answer
            elif not math.isfinite(answer):
                failed[at] = f"the score is {answer}"
            else:
                raw[at] = answer
        return raw, failed

    def _shape(self, logits_N: Floats, prompts: Sequence[str]) -> Floats:
        """What config.shape makes of the logits; the formulas are in `rlalign.config.reward.SHAPES`."""
        config = self.config
        if config.shape == "logit" or not len(logits_N):
            return logits_N
        if config.shape == "sigmoid":
            references = [
                self.references[p] if self.references else _needed(config.reference, "reference") for p in prompts
            ]
            return np.array([centred_sigmoid(r, ref) for r, ref in zip(logits_N, references, strict=True)])
        if config.shape == "lower_bound":
            return _needed(self.bootstrap, "calibration fitted on scores").lower(logits_N, config.confidence)
        if config.shape == "log_odds":
            return cast("AffineCalibrator", self.calibrator).log_odds(logits_N)
        p_N = _needed(self.calibrator, "calibration").probabilities(logits_N)
        return p_N if config.shape == "probability" else (p_N >= config.threshold).astype(np.float64)

    def _unsure(self, logits_N: Floats) -> NDArray[np.bool_]:
        """[N] bool: calibrated probability strictly inside config.unsure."""
        if not self.config.unsure or not len(logits_N):
            return np.zeros(len(logits_N), dtype=bool)
        low, high = self.config.unsure
        p_N = _needed(self.calibrator, "calibration").probabilities(logits_N)
        return (p_N > low) & (p_N < high)

    def _measured(self, logits_N: Floats, *, filtered: int) -> dict[str, float]:
        """Beyond what every component logs: where the scores lie on the calibration, and how many the filter took."""
        found = {"filtered": float(filtered)} if self.config.unsure else {}
        if self.calibrator is not None and len(logits_N):
            found["probability_mean"] = float(self.calibrator.probabilities(logits_N).mean())
            found["out_of_support_frac"] = self.calibrator.out_of_support(logits_N) / len(logits_N)
        return found
