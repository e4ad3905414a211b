"""A reward model in the run: a scorer's logits, what is done to them, and a reason wherever there is none.

N samples that have a score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from rlalign.reward.mixture import ComponentScore, Sample
from rlalign.reward.shaping import BootstrapCalibration, centred_sigmoid, without_length_bias
from rlalign.types import RewardScore

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlalign.calibration.arrays import Floats
    from rlalign.calibration.calibrators import Calibrator
    from rlalign.calibration.calibrators.affine import AffineCalibrator
    from rlalign.config import RewardModelConfig
    from rlalign.scoring.params import ScoringParams
    from rlalign.scoring.result import ScoreResult
    from rlalign.scoring.scorer import Scoring

    Score = Callable[[Sequence[tuple[str, str]]], Sequence[float | str]]


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
        raise ValueError(
            f"{result.model}: a reward is one number a completion, but the scores have shape {_shape(result.scores[i])}; "
            "use a sequence classifier or a generative judge"
        )
    if result.label_mass is not None:
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


def _shape(score: np.ndarray | None) -> tuple[int, ...]:
    return () if score is None else score.shape


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
        """Logits [B], NaN where there is none, and the reasons."""
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
