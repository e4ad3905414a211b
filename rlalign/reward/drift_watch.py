"""The drift monitors of a run: one for every calibrated reward model, fed each step, with events, refits and a stop.

B samples of a step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rlalign.calibration.drift.drift_monitor import DriftMonitor
from rlalign.calibration.drift.drift_report import DriftLimits, DriftReport, DriftState
from rlalign.config.reward import VERIFIER
from rlalign.tracking.files import write_atomic

if TYPE_CHECKING:
    from rlalign.calibration.calibrators import Calibrator
    from rlalign.config.reward import DriftConfig
    from rlalign.reward.mixture import Rewards

TOLD = "told.json"
CALM = 5  # reports in a milder state before an event says so: noise around a limit is one event, not many
SEVERITY = (DriftState.ok, DriftState.warn, DriftState.drift)


class RewardDriftError(RuntimeError):
    """A reward model drifted from the verifier and reward.drift.action is stop."""


class Calibrated(Protocol):
    """A reward model of the run, whose calibrator may be replaced between steps."""

    calibrator: Calibrator | None


class EventLog(Protocol):
    """Where events are written down."""

    def event(self, kind: str, message: str) -> None: ...


@dataclass
class _Watched:
    model: Calibrated
    monitor: DriftMonitor
    told: DriftState = DriftState.ok
    calm: int = 0


class DriftWatch:
    """Feeds every step's logits and verified labels to the monitors, and carries out what they ask for.

    models: by name; those without a calibrator are not watched, and one whose calibrator says nothing about the level of its
    scores (fitted on pairs) is not watched either, which is an event. folder: NAME.json holds each model's latest report,
    and every calibration that a refit put in force is kept there, so that a logged version can be looked up.
    """

    def __init__(
        self,
        models: Mapping[str, Calibrated],
        config: DriftConfig,
        *,
        folder: Path,
        log: EventLog,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._folder, self._log, self._say = config, folder, log, say
        self._watched: dict[str, _Watched] = {}
        self._drifted: list[str] = []
        for name, model in models.items():
            if model.calibrator is None or config.every == 0:
                continue
            fit = model.calibrator.diagnostics_
            if fit is not None and fit.pairs:
                log.event("drift/unwatched", f"{name}: its calibration was fitted on pairs, so no level is promised")
                continue
            limits = DriftLimits(**{each.name: getattr(config, each.name) for each in fields(DriftLimits)})
            sizes = {"window": config.window, "min_labels": config.min_labels, "bins": config.bins}
            self._watched[name] = _Watched(model, DriftMonitor(model.calibrator, limits=limits, **sizes))

    def step(
        self, step: int, rewards: Rewards, *, policy_versions: np.ndarray, prompt_ids: np.ndarray
    ) -> dict[str, float]:
        """Metrics `reward/drift/NAME/...` of this step; calibrations change only here, so a step has one.

        policy_versions, prompt_ids: [B].
        """
        metrics: dict[str, float] = {}
        right_B = rewards.components[VERIFIER].score.raw.numpy() >= np.float32(self._config.right)  # scored in float32
        for name, watched in self._watched.items():
            logit_B = rewards.components[name].score.raw.numpy()
            scored_B = np.isfinite(logit_B)
            watched.monitor.update(
                logit_B[scored_B],
                right_B[scored_B],
                step=step,
                policy_version=policy_versions[scored_B],
                clusters=prompt_ids[scored_B],
            )
            scored_by = watched.monitor.calibration_version
            if step % self._config.every == 0:
                report = watched.monitor.report()
                metrics |= {f"reward/drift/{name}/{key}": value for key, value in report.metrics().items()}
                self._write(name, report)
                self._tell(name, watched, report)
            metrics[f"reward/drift/{name}/calibration_version"] = float(scored_by)
            self._refit(name, watched)
        return metrics

    def stop_if_asked(self) -> None:
        """Raises RewardDriftError after a drift where the configuration says stop; call it when the step is written down."""
        if self._drifted and self._config.action == "stop":
            said = "\n".join(self._drifted)
            raise RewardDriftError(
                f"{said}\nreward.drift.action=stop. Fit a new calibration on recent labels, train the reward model on them, "
                "give the verifier weight, or set reward.drift.refit_every"
            )

    def save_state(self, folder: Path) -> None:
        """Every monitor, with the calibration in force, into a folder of its own."""
        for name, watched in self._watched.items():
            watched.monitor.save(folder / name)
            (folder / name / TOLD).write_text(json.dumps({"told": watched.told.value, "calm": watched.calm}) + "\n")

    def load_state(self, folder: Path) -> None:
        """Go on where `save_state` left it, refitted calibrations included.

        Raises RuntimeError where the calibration file given to this run is not the one that the saved run started from.
        """
        for name, watched in self._watched.items():
            monitor = DriftMonitor.load(folder / name)
            given, saved = watched.monitor.calibrator.calibration_id, monitor.calibrator.calibration_id
            if monitor.calibration_version == 0 and given != saved:
                raise RuntimeError(
                    f"reward model {name}: the run was saved with calibration {saved}, its file now holds {given}; put the "
                    "file back, or start a new run"
                )
            told = json.loads((folder / name / TOLD).read_text())
            watched.model.calibrator = monitor.calibrator
            self._watched[name] = _Watched(watched.model, monitor, DriftState(told["told"]), told["calm"])

    def _tell(self, name: str, watched: _Watched, report: DriftReport) -> None:
        """An event when the state becomes worse, or has been milder for a while."""
        if report.state is DriftState.insufficient_data:
            return
        worse = SEVERITY.index(report.state) > SEVERITY.index(watched.told)
        watched.calm = watched.calm + 1 if SEVERITY.index(report.state) < SEVERITY.index(watched.told) else 0
        if not worse and watched.calm < CALM:
            return
        watched.told, watched.calm = report.state, 0
        message = f"reward model {name}: {report.message()}"
        self._log.event(f"drift/{report.state.value}", message)
        if report.state is DriftState.drift:
            self._say(message)
            self._drifted.append(message)

    def _refit(self, name: str, watched: _Watched) -> None:
        every = self._config.refit_every
        if not every or not watched.monitor.refit_due(every=every):
            return
        outcome = watched.monitor.refit()
        self._log.event("drift/refit", f"reward model {name}: {outcome.message()}")
        if outcome.adopted:
            watched.model.calibrator = watched.monitor.calibrator
            watched.told, watched.calm = DriftState.ok, 0
            watched.monitor.calibrator.save(self._folder / f"{name}-{outcome.version}-{outcome.after_id}.calib.json")

    def _write(self, name: str, report: DriftReport) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._folder / f"{name}.json", json.dumps(report.as_json(), allow_nan=False) + "\n")
