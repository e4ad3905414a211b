"""DriftMonitor: remembers scores and labels as a run goes on, reports whether the calibration still holds, and fits another.

N rows of one call.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from rlalign.calibration.arrays import binary_labels, row_weights, whole
from rlalign.calibration.calibrators import (
    Calibrator,
    IdentityCalibrator,
    NotFittedError,
    PlattCalibrator,
    calibration_file,
)
from rlalign.calibration.calibrators.cross_fit import ScoreRows, cross_fitted, fit_and_hear
from rlalign.calibration.drift.drift_report import DriftLimits, DriftReport, DriftState, judge
from rlalign.calibration.drift.judgement import Judged, Shift, describe, mean_interval, shift
from rlalign.calibration.drift.memory import LabelOutcome, RowId, Rows, checked_ids

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Numbers
    from rlalign.calibration.calibrators import Calibrator

FORMAT, FORMAT_VERSION = "rlalign-drift", 1
ROWS = "drift.npz"
OPTIONS = ("window", "min_labels", "bins", "seed")


class DriftMonitor:
    """A window of (logit, verified label) rows against the calibrator that scores them. Not thread-safe: hold a lock.

    calibrator: fitted, one logit per row. window: labelled rows that count, and scores for PSI and support. min_labels:
    below this many effective labels the state is `insufficient_data`, never `ok`. bins: of the ECE. limits: how much
    drift is too much. seed: of the bootstrap; equal rows give equal reports.
    A row is judged by the calibration that scored it: after a swap or refit the report starts anew, while the older rows
    stay as material for the next refit.
    Raises ValueError on a calibrator of pairs or classes and on sizes that cannot work, NotFittedError before a fit.
    """

    def __init__(
        self,
        calibrator: Calibrator,
        *,
        window: int = 2000,
        min_labels: int = 200,
        bins: int = 15,
        limits: DriftLimits | None = None,
        seed: int = 0,
    ) -> None:
        self.min_labels = whole(min_labels, "min_labels", at_least=2)
        self.window = whole(window, "window", at_least=1)
        self.bins = whole(bins, "bins", at_least=1)
        if window < min_labels:
            raise ValueError(f"DriftMonitor: a window of {window} rows never holds min_labels = {min_labels} of them")
        self.limits, self.seed = limits or DriftLimits(), seed
        self._calibrator = _usable(calibrator)
        self._version = 0
        self._rows = Rows(window)
        self._tried_at = 0  # step of the last swap or refit, taken or not

    @property
    def calibrator(self) -> Calibrator:
        """The calibration in force: the one given, until `refit` or `swap` puts another in its place."""
        return self._calibrator

    @property
    def calibration_version(self) -> int:
        """0 for the calibrator given, one more for each that replaced it."""
        return self._version

    @property
    def last_step(self) -> int:
        """Of the newest scores; 0 before any."""
        return max(self._rows.last_step, 0)

    def update(
        self,
        logits: Numbers,
        labels: Numbers,
        *,
        step: int,
        policy_version: int | Numbers | None = None,
        weight: Numbers | None = None,
        ids: Sequence[RowId] | None = None,
        clusters: Numbers | None = None,
    ) -> LabelOutcome:
        """Scores whose labels are known now: raw logits [N] or [N, 1], labels [N] of 0 and 1.

        step: never falls from call to call. policy_version: one for all rows, or [N]. weight: [N], one over the chance that
        the row was picked for labelling (inverse probability weights; 1 for labels on everything). ids: [N], for duplicates
        and revised labels; without them every row counts as new. clusters: [N] whole numbers such as the prompt: rows of
        one cluster are not independent, and ranges that ignore it are too narrow.
        Raises ValueError on bad input and on a step that went back; nothing is kept of such a call.
        """
        scored = self._rows.scored(
            logits, step=step, policy_version=policy_version, clusters=clusters, calibration=self._version
        )
        label_N, weight_N = _labels(labels, weight, len(scored["logit"]))
        return self._rows.labelled(
            scored, label_N, weight_N, None if ids is None else checked_ids(ids, len(scored["logit"]))
        )

    def remember(
        self,
        ids: Sequence[RowId],
        logits: Numbers,
        *,
        step: int,
        policy_version: int | Numbers | None = None,
        clusters: Numbers | None = None,
    ) -> None:
        """Scores [N] whose labels may come later through `label`. They count for PSI and support at once.

        A score for an id that waits already replaces it; of an id labelled already it is ignored. When ten windows of
        scores wait, the oldest are forgotten. Raises ValueError on bad input and on a step that went back; nothing is kept
        of such a call.
        """
        scored = self._rows.scored(
            logits, step=step, policy_version=policy_version, clusters=clusters, calibration=self._version
        )
        self._rows.remember(checked_ids(ids, len(scored["logit"])), scored)

    def label(self, ids: Sequence[RowId], labels: Numbers, *, weight: Numbers | None = None) -> LabelOutcome:
        """Labels [N] of scores given to `remember` (or labelled before: a revision), whenever they come in.

        Unknown ids are returned and counted, not raised: labels of a restarted service are no reason to lose the others.
        Raises ValueError on bad input; nothing is kept of such a call.
        """
        known = checked_ids(ids, len(ids))
        return self._rows.label(known, *_labels(labels, weight, len(known)))

    def report(self) -> DriftReport:
        """What the rows say now. Changes nothing; without rows an empty report in state `insufficient_data`."""
        judged = self._judged()
        labels = describe(judged, bins=self.bins, min_labels=self.min_labels, seed=self.seed) if len(judged) else None
        moved, fit = self._shift(), self._calibrator.diagnostics_
        auroc_at_fit = None if fit is None else fit.auroc
        state, checks = judge(
            labels, moved, scores=len(self._rows.scores), auroc_at_fit=auroc_at_fit, limits=self.limits,
            min_labels=self.min_labels,
        )  # fmt: skip
        return DriftReport(
            state=state,
            checks=checks,
            calibration_id=self._calibrator.calibration_id,
            calibration_version=self._version,
            min_labels=self.min_labels,
            labels=labels,
            scores=len(self._rows.scores),
            shift=moved,
            auroc_at_fit=auroc_at_fit,
            waiting=len(self._rows.waiting),
            counts=replace(self._rows.counts),
        )

    def refit_due(self, *, every: int) -> bool:
        """True when `every` steps of scores came since the last swap or refit, and enough labels to judge what is in force."""
        return self.last_step - self._tried_at >= every and self._judged().effective >= self.min_labels

    def refit(self) -> RefitOutcome:
        """Fit a calibrator of the same kind on all labelled rows; from now on it is in force, if it is the better one.

        See `refitted` for what better means, and for rows that cannot be fitted. Raises ValueError for the identity.
        """
        self._tried_at, drifted = self.last_step, self.report().state is DriftState.drift
        calibrator, outcome = refitted(self._calibrator, self._version, self._rows.labels.rows(), drifted=drifted)
        if outcome.adopted:
            self._use(calibrator)
        return outcome

    def swap(self, calibrator: Calibrator) -> None:
        """Use another calibrator from now on. Rows of another model's logits are forgotten. Raises as the constructor."""
        if _usable(calibrator).model_ != self._calibrator.model_:
            self._rows.forget()
        self._use(calibrator)

    def save(self, folder: str | Path) -> None:
        """Write everything into a folder: rows (drift.npz, no pickle) and the calibration in force (a calibration file).

        A reader sees the old state or the new one: the rows name the calibration, which comes first and under a name of its own.
        """
        folder = Path(folder)
        calibration = f"calibration-{self._version}-{self._calibrator.calibration_id}.calib.json"
        self._calibrator.save(folder / calibration)
        state = {
            "options": {name: getattr(self, name) for name in OPTIONS},
            "limits": asdict(self.limits),
            "calibration_version": self._version,
            "tried_at": self._tried_at,
        }
        meta, columns = self._rows.saved()
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "calibration": calibration, "state": state}
        content = io.BytesIO()
        np.savez(content, meta=np.array(json.dumps(head | meta)), **columns)
        calibration_file.write_atomic(folder / ROWS, content.getvalue())
        for old in folder.glob("calibration-*.calib.json"):
            if old.name != calibration:
                old.unlink()

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """A monitor that goes on where `save` left it.

        Raises ValueError on a folder that does not hold one, CalibrationMismatchError on an edited calibration.
        """
        path = Path(folder) / ROWS
        if not path.is_file():
            raise ValueError(f"{folder}: no {ROWS} in it, so no drift monitor was saved there")
        try:
            with np.load(path, allow_pickle=False) as content:
                columns = dict(content)
            meta = json.loads(str(columns["meta"]))
            found = meta["format"], meta["format_version"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a saved drift monitor ({error})") from error
        if found != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"{path}: holds {found}, this rlalign reads {(FORMAT, FORMAT_VERSION)}")
        state, calibrator = meta["state"], Calibrator.load(Path(folder) / meta["calibration"])
        monitor = cls(calibrator, limits=DriftLimits(**state["limits"]), **state["options"])
        monitor._rows = Rows.of_saved(meta, columns, state["options"]["window"])
        monitor._version, monitor._tried_at = state["calibration_version"], state["tried_at"]
        return monitor

    def _use(self, calibrator: Calibrator) -> None:
        self._calibrator, self._tried_at = calibrator, self.last_step
        self._version += 1

    def _judged(self) -> Judged:
        """Labelled rows that the calibration in force has scored, by rising step and in an order free of their arrival."""
        rows = self._rows.labels.rows()
        ours_N = np.flatnonzero((rows["calibration"] == self._version) & (rows["weight"] > 0))
        rows = {name: column[ours_N] for name, column in rows.items()}
        order_N = np.lexsort([rows[name] for name in ("weight", "label", "logit", "cluster", "step")])
        rows = {name: column[order_N] for name, column in rows.items()}
        return Judged(
            p_N=self._calibrator.probabilities(rows["logit"]),
            y_N=rows["label"],
            weight_N=rows["weight"],
            cluster_N=rows["cluster"],
            step_N=rows["step"],
            version_N=rows["policy_version"],
        )

    def _shift(self) -> Shift | None:
        fit, rows = self._calibrator.diagnostics_, self._rows.scores.rows()
        if fit is None or not rows["weight"].any():
            return None
        counted_N = rows["weight"] > 0
        logit_N, weight_N, cluster_N = (rows[name][counted_N] for name in ("logit", "weight", "cluster"))
        return shift(logit_N, weight_N, cluster_N, fit.support, fit.effective_n)


def _usable(calibrator: Calibrator) -> Calibrator:
    if not calibrator.fitted:
        raise NotFittedError(f"DriftMonitor: {type(calibrator).__name__} is not fitted; call fit or load first")
    fit = calibrator.diagnostics_
    if fit is not None and fit.pairs:
        raise ValueError(
            "DriftMonitor: the calibration was fitted on pairs, so the level of its scores is arbitrary and E[p] - E[y] "
            "means nothing; fit it on single responses with labels"
        )
    try:
        shape = calibrator.probabilities(np.zeros(1)).shape
    except ValueError as error:
        raise ValueError(f"DriftMonitor: watches one logit per row; {error}") from error
    assert shape == (1,)
    return calibrator


def _labels(labels: Numbers, weight: Numbers | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    label_N = binary_labels(labels, soft=False)
    if len(label_N) != count:
        raise ValueError(f"labels: expected one per row, got {len(label_N)} for {count} rows")
    return label_N, np.ones(count) if weight is None or count == 0 else row_weights(weight, count)


FOLDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitOutcome:
    """adopted: the new calibration is in force. reason: why it is not, "" when it is.

    brier_before: of the calibration in force on the rows; brier_after: of the new one, cross-fitted (None where nothing
    could be fitted). warnings: what the fit warned of.
    """

    adopted: bool
    reason: str = ""
    before_id: str
    after_id: str
    version: int
    labels: int
    brier_before: float | None = None
    brier_after: float | None = None
    warnings: tuple[str, ...] = ()

    def message(self) -> str:
        """One line: what is in force now and why."""
        score = (
            ""
            if self.brier_after is None
            else f", Brier {self.brier_before:.4f} to {self.brier_after:.4f} cross-fitted"
        )
        if self.adopted:
            return f"refit on {self.labels} labels: {self.before_id} to {self.after_id} (version {self.version}){score}"
        return f"refit on {self.labels} labels: {self.before_id} stays, {self.reason}{score}"


def refitted(
    current: Calibrator, version: int, rows: dict[str, np.ndarray], *, drifted: bool
) -> tuple[Calibrator, RefitOutcome]:
    """The calibration to be in force after a fit of its kind on labelled rows: the new one where rows it has not seen show that
    it is better. version: of the current one.

    Better: the cross-fitted Brier score of the new one is lower. Beyond chance (95 %, one-sided, over clusters), or versions
    would change while nothing else does; where the current one is known to have drifted, lower is enough. Scores that fall
    with success, or labels that are all the same, leave Platt with a rate: the reward model then has no say until later
    labels give it one. The other kinds cannot follow such rows, which is a reason and not an exception: the run goes on with
    what it has. Raises ValueError for the identity.
    """
    if isinstance(current, IdentityCalibrator):
        raise ValueError("refit: the identity calibrator has nothing to fit; start from another method")
    logit_N, label_N, weight_N, cluster_N = (rows[name] for name in ("logit", "label", "weight", "cluster"))
    _, group_N = np.unique(cluster_N, return_inverse=True)
    scored = ScoreRows(shape="binary", logits=logit_N, labels_N=label_N, weight_N=weight_N, group_N=group_N)
    before = current.calibration_id
    stays = RefitOutcome(adopted=False, before_id=before, after_id=before, version=version, labels=len(logit_N))
    calibrator = _like(current)
    try:
        said = fit_and_hear(calibrator, scored)
        held_N = cross_fitted(lambda: _like(current), scored, folds=FOLDS)
    except ValueError as error:
        return current, replace(stays, reason=f"the rows cannot be fitted ({error})")
    calibrator.model_ = current.model_
    before_N, after_N = (current.transform(logit_N) - label_N) ** 2, (held_N - label_N) ** 2
    won = mean_interval(before_N - after_N, weight_N, cluster_N, level=0.9)
    judged = replace(
        stays,
        brier_before=float(np.average(before_N, weights=weight_N)),
        brier_after=float(np.average(after_N, weights=weight_N)),
        warnings=tuple(said),
    )
    if won is None or not (won.value if drifted else won.low) > 0:
        return current, replace(judged, reason=f"the new fit is not better{'' if drifted else ' beyond chance'}")
    return calibrator, replace(judged, adopted=True, after_id=calibrator.calibration_id, version=version + 1)


def _like(current: Calibrator) -> Calibrator:
    """Unfitted, of the same kind and options; a Platt that must not fall may become flat."""
    if isinstance(current, PlattCalibrator) and not current.allow_negative_scale:
        return PlattCalibrator(smooth_targets=current.smooth_targets, flat_if_falling=True)
    return current.unfitted()
