"""From the reward section of the configuration to the mixture that a run calls: models, calibrations, references."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from rlalign.calibration.calibrators import AffineCalibrator, Calibrator
from rlalign.calibration.calibrators.cross_fit import fit_on, read_score_rows
from rlalign.config import RewardConfig, RewardModelConfig
from rlalign.config.reward import CALIBRATED, OWN
from rlalign.reward.mixture import ModelReward, RewardMixture, logits_by
from rlalign.reward.shaping import BootstrapCalibration
from rlalign.reward.training import CALIBRATION, SCORES
from rlalign.reward.training.examples import Labelled, read_rows
from rlalign.scoring.calibrated import require_same_model
from rlalign.scoring.params import ScoringParams

if TYPE_CHECKING:
    from rlalign.reward.mixture import Score
    from rlalign.scoring.params import ModelInfo
    from rlalign.scoring.scorer import Scoring


def load_mixture(config: RewardConfig, say: Callable[[str], None] = print) -> RewardMixture:
    """Start every reward model and check whatever belongs to it. Raises ValueError, CalibrationMismatchError or OSError."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the run shows its own
    models = {name: _model_reward(name, model, say) for name, model in config.models.items()}
    return RewardMixture(models, weights=config.active, max_failed=config.max_failed)


def _model_reward(name: str, config: RewardModelConfig, say: Callable[[str], None]) -> ModelReward:
    say(f"loading reward model {name}")
    what = f"reward.models.{name}"
    folder = _folder(config.path, say) if config.path else None
    scorer = _scorer(config, folder, what)
    try:  # raw logits are what is asked for, whatever the model's own defaults are
        params = msgspec.convert(dict(config.params), ScoringParams)
    except msgspec.ValidationError as error:
        raise ValueError(f"{what}.params: {error}") from error
    _require_one_number(config, scorer.info, params, what)
    score = logits_by(scorer, params, label_index=config.label_index, chat=config.chat_template)
    calibrator = _calibrator(config, folder, scorer, what) if config.calibration else None
    reward = ModelReward(
        config=config,
        score=score,
        calibrator=calibrator,
        bootstrap=_bootstrap(config, folder, calibrator, what) if config.scores and calibrator is not None else None,
        references=_references(Path(config.references), score, what) if config.references else {},
    )
    say(
        f"reward model {name}: {scorer.info.id}, shape {config.shape}"
        + (f", {calibrator.calibration_id}" if calibrator else "")
    )
    return reward


def _folder(path: str, say: Callable[[str], None]) -> Path:
    """A local folder, or the tiny reward model named tiny:untied or tiny:tied."""
    if path.startswith("tiny:"):
        from rlalign.reward.training.tiny_reward import cached_reward_model

        return cached_reward_model(path.removeprefix("tiny:"), report=say)
    folder = Path(path).expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"reward model path={path!r} is not a Hugging Face folder (no config.json there). Give a local folder, or "
            "tiny:untied / tiny:tied for the demo's own reward model"
        )
    return folder


def _scorer(config: RewardModelConfig, folder: Path | None, what: str) -> Scoring:
    if folder is not None:
        import torch

        from rlalign.scoring.hf import HFScorer

        here = "cuda" if torch.cuda.is_available() else "cpu"
        return HFScorer(str(folder), dtype=config.dtype, device=here if config.device == "auto" else config.device)
    from rlalign.scoring.http import HTTPScorer

    server = config.server
    if server.api_key_env and not os.environ.get(server.api_key_env):
        raise ValueError(f"{what}.server.api_key_env: the environment variable {server.api_key_env} is not set")
    return HTTPScorer(
        server.url,
        server.dialect,
        model=server.model or None,
        tokenizer=server.tokenizer or None,
        api_key=os.environ[server.api_key_env] if server.api_key_env else None,
        timeout=server.timeout_s,
        server_calibrated=None if server.raw is None else not server.raw,
    )


def _require_one_number(config: RewardModelConfig, info: ModelInfo, params: ScoringParams, what: str) -> None:
    """Now, not after the engines have started. A server may not say how many labels its model has: then at the first score."""
    task = params.task or info.tasks[0]
    if task not in ("classify", "generative"):
        raise ValueError(
            f"{what}: task {task} gives more than one number a completion, or none; use a classifier or a judge"
        )
    given = params.label_token_ids
    if task == "generative" and given is not None and len(given) != 2:
        raise ValueError(
            f"{what}: a judge's reward is the log-odds of two labels, yes first, and label_token_ids has {len(given)}"
        )
    labels, index = info.num_labels, config.label_index
    if task == "classify" and labels > 1 and (index is None or not 0 <= index < labels):
        raise ValueError(
            f"{what}: the model has {labels} labels; say which one is the reward with label_index, got {index}"
        )


def _calibrator(config: RewardModelConfig, folder: Path | None, scorer: Scoring, what: str) -> Calibrator:
    if scorer.info.already_calibrated:
        raise ValueError(
            f"{what}: the server shifts and scales its logits already, or nothing proves that it does not; calibrating them "
            "again would be wrong. Serve the model without, state server.raw=true, or take the calibration out"
        )
    own = config.calibration == OWN
    calibrator = Calibrator.load(_place(config.calibration, folder, CALIBRATION, what))
    require_same_model(calibrator, scorer.info, what=f"{what}.calibration={config.calibration}", same_folder=own)
    if config.shape == "log_odds" and (not isinstance(calibrator, AffineCalibrator) or calibrator.scale_ == 0):
        raise ValueError(
            f"{what}: shape=log_odds needs an affine calibration with a scale (platt, temperature), got {calibrator.method}"
        )
    report = calibrator.diagnostics_
    if config.shape in CALIBRATED and report is not None and report.pairs and config.shape != "log_odds":
        raise ValueError(
            f"{what}: shape={config.shape} with a calibration fitted on pairs: they say nothing about the level of a "
            "probability; fit on labelled scores, or use shape=log_odds or sigmoid"
        )
    return calibrator


def _place(stated: str, folder: Path | None, own: str, what: str) -> Path:
    """The file called `own` in the model's folder for OWN, else the one that was stated."""
    if stated != OWN:
        return Path(stated)
    if folder is None:
        raise ValueError(f"{what}: {own} of its own folder was asked for, and a model behind a server has no folder")
    return folder / own


def _bootstrap(
    config: RewardModelConfig, folder: Path | None, calibrator: Calibrator, what: str
) -> BootstrapCalibration:
    path = _place(config.scores, folder, SCORES, what)
    rows = read_score_rows(path)
    first, again = calibrator.diagnostics_, fit_on(copy.deepcopy(calibrator), rows).diagnostics_
    if first is None or again is None or again.data_sha256 != first.data_sha256:
        raise ValueError(
            f"{what}.scores: {path} is not what the calibration was fitted on; give that file, or calibrate on this one"
        )
    return BootstrapCalibration.fit(calibrator, rows)


def _references(path: Path, score: Score, what: str) -> dict[str, list[float]]:
    """Scores of the completions in a file, by prompt. Raises ValueError where one of them has none."""
    rows = read_rows(path)
    labelled = [row for row in rows if isinstance(row, Labelled)]
    if not labelled:
        raise ValueError(f"{what}.references: {path} holds pairs; expected completions of the initial policy")
    pairs = list(dict.fromkeys((row.prompt, row.completion) for row in labelled))
    scores = dict(zip(pairs, score(pairs), strict=True))
    references: dict[str, list[float]] = {}
    for row in labelled:
        answer = scores[row.prompt, row.completion]
        if isinstance(answer, str):
            raise ValueError(
                f"{what}.references: {path}: the completion {row.completion!r} of {row.prompt!r} has no score: {answer}"
            )
        references.setdefault(row.prompt, []).append(answer)
    return references
