"""The rows a drift monitor remembers: labelled ones, all scores, and scores whose label is still to come.

N rows of one call.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from rlalign.calibration.arrays import as_rows, numbers, whole

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Floats, Numbers


class Ring:
    """The last W rows of some columns, oldest first. Appending is vectorised: rows that would be pushed out are not copied."""

    def __init__(self, columns: dict[str, type], capacity: int) -> None:
        self.columns = {name: np.zeros(capacity, dtype=kind) for name, kind in columns.items()}
        self.capacity = capacity
        self.total = 0  # rows ever appended; row number r lies in slot r % capacity

    def __len__(self) -> int:
        return min(self.total, self.capacity)

    @property
    def first(self) -> int:
        """Number of the oldest row that is still held."""
        return self.total - len(self)

    def append(self, rows: dict[str, np.ndarray]) -> range:
        """Append N rows. Returns their row numbers, also of those that never fitted."""
        count = len(next(iter(rows.values())))
        kept = min(count, self.capacity)
        slots_N = np.arange(self.total + count - kept, self.total + count) % self.capacity
        for name, column in self.columns.items():
            column[slots_N] = rows[name][count - kept :]
        numbers = range(self.total, self.total + count)
        self.total += count
        return numbers

    def rows(self) -> dict[str, np.ndarray]:
        """Copies of the held rows, oldest first."""
        slots_W = np.arange(self.first, self.total) % self.capacity
        return {name: column[slots_W] for name, column in self.columns.items()}


RowId = str | int
NO_VERSION = -1  # of a row scored without a policy version
WAITING_WINDOWS = 10  # scores that may wait for a label, in windows

SCORED = {
    "logit": np.float64,
    "step": np.int64,
    "policy_version": np.int64,
    "cluster": np.int64,
    "calibration": np.int64,  # number of the calibration in force when the row was scored
}
LABELLED = SCORED | {"label": np.float64, "weight": np.float64}
SCORES = {"logit": np.float64, "weight": np.float64, "cluster": np.int64}


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelOutcome:
    """What became of the labels of one call; together they are its rows.

    accepted: new in the window. duplicates: known with the same label, ignored. revised: known with another label, which
    counts from now on. unknown: ids that were never scored, or were forgotten before their label came.
    """

    accepted: int
    duplicates: int
    revised: int
    unknown: tuple[RowId, ...]


@dataclass(slots=True, kw_only=True)
class Counts:
    """Rows over the monitor's life. forgotten: scores dropped because their label did not come in time."""

    accepted: int = 0
    duplicates: int = 0
    revised: int = 0
    unknown: int = 0
    forgotten: int = 0


Scored = dict[str, np.ndarray]  # the columns of SCORED, [N] each


class Rows:
    """What is remembered, and what a label that comes in does to it."""

    def __init__(self, window: int) -> None:
        self.labels = Ring(LABELLED, window)
        self.scores = Ring(SCORES, window)
        self.waiting: dict[RowId, tuple[float, int, int, int, int]] = {}  # the columns of SCORED, oldest first
        self.known: dict[RowId, int] = {}  # row number in `labels`, rising
        self.counts = Counts()
        self.last_step = -1
        self.loners = 0  # rows that came without a cluster: each is one of its own, numbered below 0

    def scored(
        self,
        logits: Numbers,
        *,
        step: int,
        policy_version: int | Numbers | None,
        clusters: Numbers | None,
        calibration: int,
    ) -> Scored:
        """Check scores and spread what is one for all rows. Raises ValueError as `DriftMonitor.update` says."""
        logit_N = as_rows(logits, "logits")
        if logit_N.ndim != 1:
            raise ValueError(f"logits: a drift monitor watches one logit per row, got shape {logit_N.shape}")
        if whole(step, "step", at_least=0) < self.last_step:
            raise ValueError(
                f"step went back: {step} after {self.last_step}. After a resume, go on from the state saved with that checkpoint "
                "(DriftMonitor.load); a run that starts anew needs a new monitor"
            )
        count = len(logit_N)
        return {
            "logit": logit_N,
            "step": np.full(count, step, dtype=np.int64),
            "policy_version": _whole_rows(policy_version, "policy_version", count),
            "cluster": _whole_rows(clusters, "clusters", count),
            "calibration": np.full(count, calibration, dtype=np.int64),
        }

    def labelled(self, scored: Scored, label_N: Floats, weight_N: Floats, ids: Sequence[RowId] | None) -> LabelOutcome:
        """Rows whose labels come with their scores."""
        if ids is not None:
            self._wait(ids, scored, weight_N)
            return self.label(ids, label_N, weight_N)
        self._enter(scored)
        self.scores.append({"logit": scored["logit"], "weight": weight_N, "cluster": scored["cluster"]})
        self.labels.append(scored | {"label": label_N, "weight": weight_N})
        self._forget_known()
        return self._told(accepted=len(label_N))

    def remember(self, ids: Sequence[RowId], scored: Scored) -> None:
        """Rows whose labels may come later."""
        self._wait(ids, scored, np.ones(len(ids)))
        for row_id in list(self.waiting)[: max(len(self.waiting) - WAITING_WINDOWS * self.labels.capacity, 0)]:
            del self.waiting[row_id]
            self.counts.forgotten += 1

    def label(self, ids: Sequence[RowId], label_N: Floats, weight_N: Floats) -> LabelOutcome:
        """Labels of rows that wait for one, or have one."""
        label_N = label_N.copy()
        new: dict[RowId, int] = {}  # position in this call
        duplicates, revised, unknown = 0, 0, []
        for i, row_id in enumerate(ids):
            if row_id in self.known:
                changed = self._revise(self.known[row_id], label_N[i], weight_N[i])
            elif row_id in new:
                changed = bool(label_N[new[row_id]] != label_N[i])
                label_N[new[row_id]] = label_N[i]
            elif row_id in self.waiting:
                new[row_id] = i
                continue
            else:
                unknown.append(row_id)
                continue
            revised += changed
            duplicates += not changed
        scored = _columns([self.waiting.pop(row_id) for row_id in new])
        at_N = np.fromiter(new.values(), dtype=np.int64, count=len(new))
        numbers_N = self.labels.append(scored | {"label": label_N[at_N], "weight": weight_N[at_N]})
        self.known.update(zip(new, numbers_N, strict=True))
        self._forget_known()
        return self._told(accepted=len(new), duplicates=duplicates, revised=revised, unknown=tuple(unknown))

    def forget(self) -> None:
        """Every row and id; the counts stay."""
        self.labels.total = self.scores.total = 0
        self.waiting.clear()
        self.known.clear()

    def saved(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything, as JSON and as columns."""
        meta = {
            "counts": asdict(self.counts),
            "last_step": self.last_step,
            "loners": self.loners,
            "totals": [self.labels.total, self.scores.total],
            "known": list(self.known.items()),
            "waiting": list(self.waiting),
        }
        columns: dict[str, Any] = {f"labels.{name}": column for name, column in self.labels.rows().items()}
        columns |= {f"scores.{name}": column for name, column in self.scores.rows().items()}
        return meta, columns | {f"waiting.{name}": column for name, column in _columns(self.waiting.values()).items()}

    @classmethod
    def of_saved(cls, meta: dict[str, Any], columns: dict[str, np.ndarray], window: int) -> Self:
        """The inverse of `saved`."""
        rows = cls(window)
        for ring, name, total in zip((rows.labels, rows.scores), ("labels.", "scores."), meta["totals"], strict=True):
            held = {n.removeprefix(name): column for n, column in columns.items() if n.startswith(name)}
            ring.total = total - len(next(iter(held.values())))  # rows before them, so that they come into their slots
            ring.append(held)
        waiting = zip(*(columns[f"waiting.{name}"].tolist() for name in SCORED), strict=True)
        rows.waiting, rows.known = dict(zip(meta["waiting"], waiting, strict=True)), dict(meta["known"])
        rows.counts, rows.last_step, rows.loners = Counts(**meta["counts"]), meta["last_step"], meta["loners"]
        return rows

    def _wait(self, ids: Sequence[RowId], scored: Scored, weight_N: Floats) -> None:
        self._enter(scored)
        fresh = np.array([i not in self.waiting and i not in self.known for i in ids], dtype=bool)
        self.scores.append(
            {"logit": scored["logit"][fresh], "weight": weight_N[fresh], "cluster": scored["cluster"][fresh]}
        )
        rows = zip(*(scored[name].tolist() for name in SCORED), strict=True)
        self.waiting.update((i, row) for i, row in zip(ids, rows, strict=True) if i not in self.known)

    def _enter(self, scored: Scored) -> None:
        """Give rows without a cluster their own, and take note of the step."""
        count = len(scored["logit"])
        alone = scored["cluster"] < 0
        scored["cluster"] = np.where(alone, -1 - self.loners - np.arange(count), scored["cluster"])
        self.loners += count
        if count:
            self.last_step = int(scored["step"][0])

    def _revise(self, number: int, label: float, weight: float) -> bool:
        columns, slot = self.labels.columns, number % self.labels.capacity
        if columns["label"][slot] == label:
            return False
        columns["label"][slot], columns["weight"][slot] = label, weight
        return True

    def _forget_known(self) -> None:
        """Ids of rows that were pushed out; their numbers rise, so they come first."""
        for row_id in list(self.known):
            if self.known[row_id] >= self.labels.first:
                break
            del self.known[row_id]

    def _told(
        self, *, accepted: int, duplicates: int = 0, revised: int = 0, unknown: tuple[RowId, ...] = ()
    ) -> LabelOutcome:
        self.counts.accepted += accepted
        self.counts.duplicates += duplicates
        self.counts.revised += revised
        self.counts.unknown += len(unknown)
        return LabelOutcome(accepted=accepted, duplicates=duplicates, revised=revised, unknown=unknown)


def _columns(rows: Collection[tuple[float, int, int, int, int]]) -> Scored:
    columns = zip(*rows, strict=True) if rows else [()] * len(SCORED)
    return {name: np.array(column, dtype=SCORED[name]) for name, column in zip(SCORED, columns, strict=True)}


def _whole_rows(values: int | Numbers | None, what: str, count: int) -> np.ndarray:
    """[N] whole numbers of at least 0; one number is for all rows, None is -1. Raises ValueError on anything else."""
    if values is None:
        return np.full(count, NO_VERSION, dtype=np.int64)
    given = numbers(values, what)
    if given.ndim == 0:
        given = np.full(count, given)
    if given.shape != (count,):
        raise ValueError(f"{what}: expected one per row, got shape {given.shape} for {count} rows")
    if (given < 0).any() or (given != np.round(given)).any():
        raise ValueError(
            f"{what}: expected whole numbers of at least 0, got {given[(given < 0) | (given % 1 != 0)][0]}"
        )
    return given.astype(np.int64)


def checked_ids(ids: Sequence[RowId], count: int) -> list[RowId]:
    """Raises ValueError unless these are `count` texts or whole numbers."""
    if isinstance(ids, str | bytes) or len(ids) != count:
        raise ValueError(
            f"ids: expected one per row, got {ids if isinstance(ids, str) else len(ids)!r} for {count} rows"
        )
    for i, row_id in enumerate(ids):
        if isinstance(row_id, bool) or not isinstance(row_id, str | int):
            raise ValueError(f"ids: expected text or whole numbers, got {row_id!r} at index {i}")
    return list(ids)
