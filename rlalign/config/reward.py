"""The reward: the verifier, reward models, what is done to their scores, and how they are added up."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from rlalign.config.algo import AlgoConfig
from rlalign.config.sections import not_negative, one_of, positive, require

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
    # steps after which the calibration is fitted again on the window, if it is the better one; 0: never
    refit_every: int = 0

    def __post_init__(self) -> None:
        positive(self, "reward.drift", "window", "bins", "gap", "tilt", "ece", "auroc", "psi", "out_of_support")
        require(
            2 <= self.min_labels <= self.window,
            f"reward.drift.min_labels={self.min_labels}: from 2 to reward.drift.window={self.window}",
        )
        not_negative(self, "reward.drift", "every", "refit_every")
        require(
            self.every > 0 or self.refit_every == 0, "reward.drift.refit_every needs reward.drift.every of at least 1"
        )
        one_of(self, "reward.drift", "action", ACTIONS)


SHAPES = {  # of a reward model's score; r the raw logit, p its calibrated probability
    "logit": "r",
    "sigmoid": "sigmoid(r - reference): bounded and centred, PAR arXiv 2502.18770",
    "log_odds": "scale * (r - bias) of an affine calibration: for mixtures",
    "probability": "p",
    "lower_bound": "the lower end of p over calibrations of resampled labels",
    "threshold": "1 where p >= threshold, else 0",
}
CALIBRATED = ("log_odds", "probability", "lower_bound", "threshold")
DIALECTS = {  # of scoring servers, and where rlalign.scoring.http has each
    "vllm": "engine_dialects.VLLMDialect",
    "sglang": "engine_dialects.SGLangDialect",
    "tei": "text_dialects.TEIDialect",
    "infinity": "text_dialects.InfinityDialect",
    "openrlhf": "text_dialects.OpenRLHFDialect",
}
VERIFIER = "verifier"
TAKEN = (VERIFIER, "mean", "std", "failed", "frac_zero_std_groups", "drift")  # reward/<these> are logged already
OWN = "own"


@dataclass(kw_only=True)
class ScoringServerConfig:
    """A server that scores; see rlalign.scoring.HTTPScorer."""

    url: str = ""
    dialect: str = "auto"  # auto (asks the server) | vllm | sglang | tei | infinity | openrlhf
    model: str = ""  # its name there, where several are served
    tokenizer: str = ""  # folder of the model's tokenizer: for chat_template, and where the server would cut long text
    timeout_s: float = 60.0  # of one call with all its retries (on no connection, 429 and 5xx only)
    api_key_env: str = ""  # the environment variable that holds the key
    raw: bool | None = None  # true: the user knows that the server neither shifts nor scales its logits

    def __post_init__(self) -> None:
        one_of(self, "server", "dialect", ("auto", *DIALECTS))
        positive(self, "reward.models: server", "timeout_s")
        others = (self.model, self.tokenizer, self.api_key_env, self.raw)
        require(bool(self.url) or others == ("", "", "", None), "reward.models: server has settings, but no url")


@dataclass(kw_only=True)
class RewardModelConfig:
    """One reward model and what becomes of its score, in this order: length correction, shape, filter, weight."""

    path: str = ""  # a Hugging Face folder, scored in this process; tiny:untied / tiny:tied are built on first use
    dtype: str = "auto"  # of the model in this process; auto is its checkpoint's. The score head is float32 always
    device: str = "auto"  # of the model in this process: auto (a GPU if there is one), cpu, cuda:1 ...
    server: ScoringServerConfig = field(default_factory=ScoringServerConfig)  # instead of path: served elsewhere
    chat_template: bool = False  # through the model's chat template; false: prompt and completion one after the other
    params: dict[str, Any] = field(default_factory=dict)  # rlalign.scoring.ScoringParams of every request
    label_index: int | None = None  # which logit of a model with several labels is the reward
    empty: float | None = None  # the logit of an empty completion, which no model can read; null: it gets no reward
    weight: float = 1.0  # in the sum; 0: scored and logged, not trained on
    length_correction: float = 0.0  # share of the curve of score over length taken off, 0 to 1; arXiv 2409.17407
    shape: str = "logit"  # logit | sigmoid | log_odds | probability | lower_bound | threshold
    reference: float | None = None  # of sigmoid: the score that becomes 0.5
    references: str = ""  # of sigmoid, instead: JSONL of the initial policy's completions; each prompt has its own
    calibration: str = ""  # a file of `rlalign calibrate`; own: calibration.json in the model's folder
    scores: str = ""  # of lower_bound: the labelled scores behind the calibration; own: scores.jsonl in the folder
    confidence: float = 0.95  # of lower_bound, one-sided
    threshold: float = 0.5  # of threshold, a probability
    unsure: list[float] = field(default_factory=list)  # [low, high]: samples with low < p < high get no reward

    def __post_init__(self) -> None:
        which = "reward.models"
        require(bool(self.path) != bool(self.server.url), f"{which}: give either path or server.url")
        require(self.shape in SHAPES, f"{which}: shape={self.shape!r}: choose one of {', '.join(SHAPES)}")
        require(math.isfinite(self.weight), f"{which}: weight={self.weight}: must be finite")
        require(self.empty is None or math.isfinite(self.empty), f"{which}: empty={self.empty}: must be finite")
        share = self.length_correction
        require(0 <= share <= 1, f"{which}: length_correction={share}: a share, from 0 to 1")
        require(0.5 <= self.confidence < 1, f"{which}: confidence={self.confidence}: from 0.5 to below 1")
        require(0 < self.threshold < 1, f"{which}: threshold={self.threshold}: a probability between 0 and 1")
        require(
            self.unsure == [] or (len(self.unsure) == 2 and 0 <= self.unsure[0] < self.unsure[1] <= 1),
            f"{which}: unsure={self.unsure}: give [low, high] with 0 <= low < high <= 1",
        )
        references = (self.reference is not None) + bool(self.references)
        require(
            references == (self.shape == "sigmoid"),
            f"{which}: shape=sigmoid needs either reference (one score for all prompts) or references (a file of "
            "completions), and no other shape takes them",
        )
        self._check_calibration(which)

    def _check_calibration(self, which: str) -> None:
        used = self.shape in CALIBRATED or bool(self.unsure)
        require(
            used == bool(self.calibration),
            f"{which}: shape={self.shape} needs a calibration (unsure does, too)"
            if used
            else f"{which}: calibration is set, but shape={self.shape} would not use it: choose {', '.join(CALIBRATED)}, "
            "or take the calibration out",
        )
        require(
            not (used and self.length_correction),
            f"{which}: length_correction={self.length_correction} beside a calibration: it was fitted on scores that were not "
            "corrected; use shape=logit or sigmoid without unsure, or length_correction=0",
        )
        require(
            (self.shape == "lower_bound") == bool(self.scores),
            f"{which}: shape=lower_bound needs scores, the labelled scores that were calibrated on; no other shape takes them",
        )
        require(
            OWN not in (self.calibration, self.scores) or bool(self.path),
            f"{which}: calibration=own and scores=own are files in the folder of path; a served model needs their paths",
        )


@dataclass(kw_only=True)
class RewardConfig:
    """The reward of a sample is the sum of weight * score over the verifier and the models."""

    verifier: float = 1.0  # weight of the task's verifier; 0: measured and logged, not trained on
    models: dict[str, RewardModelConfig] = field(default_factory=dict)  # by the name they are logged under
    max_failed: float = 0.5  # the run stops when a larger share of a step's samples has no reward
    drift: DriftConfig = field(default_factory=DriftConfig)

    def __post_init__(self) -> None:
        for name in self.models:
            require(
                re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None and name not in TAKEN,
                f"reward.models.{name}: use lower-case letters, digits and _, and none of {', '.join(TAKEN)}",
            )
        require(math.isfinite(self.verifier), f"reward.verifier={self.verifier}: must be finite")
        require(bool(self.active), "reward: every weight is 0, so nothing would be trained")
        require(0 <= self.max_failed < 1, f"reward.max_failed={self.max_failed}: a share, from 0 to below 1")
        shapes = [model.shape for model in self.models.values() if model.calibration]
        require(
            self.drift.refit_every == 0 or (bool(shapes) and "lower_bound" not in shapes),
            f"reward.drift.refit_every={self.drift.refit_every}: needs a model with a calibration, and none of shape=lower_bound, "
            "whose resampled calibrations a refit would not renew",
        )

    @property
    def active(self) -> dict[str, float]:
        """The components that training follows, with their weights."""
        weights = {VERIFIER: self.verifier} | {name: model.weight for name, model in self.models.items()}
        return {name: weight for name, weight in weights.items() if weight != 0}


def require_that_it_matters(reward: RewardConfig, algo: AlgoConfig) -> None:
    """Refuse settings that group normalisation cancels: they would change every dashboard and no gradient.

    Advantages are (r - group mean) / group std, so a positive affine map of the whole reward is a no-op. A lone
    component's weight is one, and so is an affine calibration of it without the sigmoid. With algo.advantage=gae nothing is
    refused: the critic learns the reward in its own level and unit.
    """
    if algo.advantage != "group" or not algo.normalize_std or len(reward.active) != 1:
        return
    ((name, weight),) = reward.active.items()
    why = (
        "changes nothing: with algo.normalize_std=true advantages are (r - mean) / std of the group, and any positive "
        "scale and shift of the only reward cancels"
    )
    instead = (
        "For an effect choose a shape that bends (probability, sigmoid, lower_bound, threshold), mix it with another "
        "reward (reward.verifier=1), or set algo.normalize_std=false"
    )
    require(abs(weight) == 1, f"reward: the weight {weight} of {name}, the only reward, {why}; set it to 1. {instead}")
    require(
        name == VERIFIER or reward.models[name].shape != "log_odds",
        f"reward.models.{name}: shape=log_odds as the only reward {why}. {instead}",
    )
