"""Labelled scores from a JSONL file: one object per line, one shape per file.

    {"logit": 1.3, "label": 1}                          a verified response
    {"logits": [0.2, 1.1, -3], "label": 1}              a class
    {"chosen": 2.0, "rejected": 0.4}                    a preference
    "weight": 2.0 and "group": "prompt 17" may be added to each; a group is never split between folds or resamples.

N rows, K classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlalign.calibration.arrays import as_rows, numbers

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Floats

SHAPES = {"binary": {"logit", "label"}, "classes": {"logits", "label"}, "pairs": {"chosen", "rejected"}}
EXTRA = {"weight", "group"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRows:
    """logits: [N], [N, K], or for pairs [N, 2] with chosen first. labels_N: None for pairs. group_N: indices or None.

    soft: labels are rates in [0, 1] and not only 0 and 1.
    """

    shape: str
    logits: Floats
    labels_N: Floats | None
    weight_N: Floats | None
    group_N: np.ndarray | None
    soft: bool = False

    def __len__(self) -> int:
        return len(self.logits)

    def rows(self, index_N: np.ndarray) -> ScoreRows:
        """The rows in `index_N`."""
        labels_N, weight_N, group_N = (
            None if column is None else column[index_N] for column in (self.labels_N, self.weight_N, self.group_N)
        )
        return replace(self, logits=self.logits[index_N], labels_N=labels_N, weight_N=weight_N, group_N=group_N)


def read_score_rows(path: Path, *, soft: bool = False) -> ScoreRows:
    """Read a file; soft: its labels may be rates. Raises ValueError, naming file and line, on anything but the shapes above."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    records = [_record(path, i, line) for i, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    if not records:
        raise ValueError(f"{path}: empty; expected one JSON object per line")
    shape = _shape_of(path, records[0])
    wanted = set(records[0][1])
    for line, record in records:
        if set(record) != wanted:
            raise ValueError(
                f"{path}:{line}: fields {sorted(record)}, but line {records[0][0]} has {sorted(wanted)}; every line "
                "needs the same"
            )
    columns = {name: [record[name] for _, record in records] for name in wanted}
    if shape == "pairs":
        logits = np.stack([as_rows(columns[name], f"{path}: {name}") for name in ("chosen", "rejected")], axis=1)
    else:
        logits = as_rows(columns["logit" if shape == "binary" else "logits"], f"{path}: logits")
    weights = columns.get("weight")
    return ScoreRows(
        shape=shape,
        logits=logits,
        labels_N=None if shape == "pairs" else numbers(columns["label"], f"{path}: label", booleans=True),
        weight_N=None if weights is None else numbers(weights, f"{path}: weight"),
        group_N=_indices(columns["group"]) if "group" in columns else None,
        soft=soft,
    )


def _record(path: Path, number: int, line: str) -> tuple[int, dict[str, object]]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}:{number}: expected a JSON object, got {type(record).__name__}")
    return number, record


def _shape_of(path: Path, first: tuple[int, dict[str, object]]) -> str:
    line, record = first
    for shape, needed in SHAPES.items():
        if needed == set(record) - EXTRA:
            return shape
    choices = "; ".join(f"{sorted(needed)}" for needed in SHAPES.values())
    raise ValueError(
        f"{path}:{line}: fields {sorted(record)}; expected one of {choices}, and optionally {sorted(EXTRA)}"
    )


def _indices(values: list[object]) -> np.ndarray:
    known: dict[str, int] = {}
    return np.array([known.setdefault(repr(value), len(known)) for value in values])
