"""What a reward model learns from: JSONL rows, checked, and split so that no prompt is on both sides.

{"prompt": "12 + 30 =", "completion": " 42", "label": 1}             a verified completion; a label may be soft, in [0, 1]
{"prompt": "12 + 30 =", "chosen": " 42", "rejected": " 43"}          a preference
"weight": 2.0 may be added to either.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlalign.tasks.rows import jsonl_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A completion and how right it is: 1.0 right, 0.0 wrong."""

    prompt: str
    completion: str
    label: float
    weight: float = 1.0

    @property
    def texts(self) -> tuple[str, ...]:
        """What is scored."""
        return (self.completion,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two completions of one prompt, of which `chosen` is the better one."""

    prompt: str
    chosen: str
    rejected: str
    weight: float = 1.0

    @property
    def texts(self) -> tuple[str, ...]:
        """What is scored."""
        return self.chosen, self.rejected


Row = Labelled | Pair
SomeRow = TypeVar("SomeRow", Labelled, Pair)


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, of one kind. Raises ValueError naming file and line on anything that the module's text does not show."""
    rows: list[Row] = []
    for where, record in jsonl_rows(path):
        rows.append(_row(where, record))
        if type(rows[-1]) is not type(rows[0]):
            raise ValueError(f"{where}: labelled completions and pairs in one file; use one kind")
    if not rows:
        raise ValueError(f"{path}: empty; expected one JSON object per line")
    return rows


def write_rows(path: Path, rows: Iterable[Labelled] | Iterable[Pair]) -> None:
    """The inverse of `read_rows`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


def pairs_of(rows: Sequence[Labelled], *, per_prompt: int = 8, seed: int = 0) -> list[Pair]:
    """Right against wrong completions (label above and below one half) of the same prompt, at most `per_prompt` of each.

    A combination that occurs often among the samples stays as frequent among the pairs. Weights multiply. Prompts whose
    completions are all right or all wrong give none. Raises ValueError when no prompt gives one.
    """
    draw = random.Random(f"{seed}/pairs")
    pairs: list[Pair] = []
    for prompt, found in _by_prompt(rows).items():
        right = [r for r in found if r.label > 0.5]
        wrong = [r for r in found if r.label < 0.5]
        both = [(good, bad) for good in right for bad in wrong]
        for good, bad in draw.sample(both, min(per_prompt, len(both))):
            weight = good.weight * bad.weight
            pairs.append(Pair(prompt=prompt, chosen=good.completion, rejected=bad.completion, weight=weight))
    if not pairs:
        raise ValueError(
            f"none of {len(_by_prompt(rows))} prompts has both a right and a wrong completion: no pairs to learn from"
        )
    return pairs


def split(rows: Sequence[SomeRow], *, held_out: float, seed: int = 0) -> tuple[list[SomeRow], list[SomeRow]]:
    """Rows to train on, and the rows of a `held_out` share of the prompts. Raises ValueError when either would be empty."""
    prompts = list(_by_prompt(rows))
    random.Random(f"{seed}/split").shuffle(prompts)
    kept = set(prompts[: round(len(prompts) * held_out)])
    parts = [r for r in rows if r.prompt not in kept], [r for r in rows if r.prompt in kept]
    if not all(parts):
        raise ValueError(
            f"{len(prompts)} prompts cannot be split with a held-out share of {held_out}: one side is empty"
        )
    return parts


def _by_prompt(rows: Sequence[SomeRow]) -> dict[str, list[SomeRow]]:
    found: dict[str, list[SomeRow]] = {}
    for row in rows:
        found.setdefault(row.prompt, []).append(row)
    return found


def _row(where: str, record: Mapping[str, Any]) -> Row:
    weight = _number(where, record, "weight", low=0.0, high=math.inf) if "weight" in record else 1.0
    names = set(record) - {"weight"}
    if names == {"prompt", "completion", "label"}:
        prompt, completion = _texts(where, record, "prompt", "completion")
        return Labelled(
            prompt=prompt, completion=completion, label=_number(where, record, "label", low=0, high=1), weight=weight
        )
    if names == {"prompt", "chosen", "rejected"}:
        prompt, chosen, rejected = _texts(where, record, "prompt", "chosen", "rejected")
        if chosen == rejected:
            raise ValueError(f"{where}: chosen and rejected are the same text")
        return Pair(prompt=prompt, chosen=chosen, rejected=rejected, weight=weight)
    raise ValueError(
        f"{where}: fields {sorted(record)}; expected prompt, completion, label, or prompt, chosen, rejected, and optionally weight"
    )


def _texts(where: str, record: Mapping[str, Any], *names: str) -> list[str]:
    for name in names:
        if not isinstance(record[name], str) or not (record[name] or name == "prompt"):
            raise ValueError(f"{where}: {name} must be text that is not empty, got {record[name]!r}")
    return [str(record[name]) for name in names]


def _number(where: str, record: Mapping[str, Any], name: str, *, low: float, high: float) -> float:
    value = record[name]
    if not isinstance(value, int | float) or not low <= value <= high or math.isinf(value):
        raise ValueError(
            f"{where}: {name} must be a number from {low:g}"
            + (f" to {high:g}" if high < math.inf else "")
            + f", got {value!r}"
        )
    return float(value)
