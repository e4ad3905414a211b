"""Rows of JSONL files and Hugging Face datasets, each with the place it was read from, and how answers are matched."""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    Row = tuple[str, Mapping[str, Any]]  # where it was read, and its fields

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def jsonl_rows(path: Path) -> Iterator[Row]:
    """One row per non-blank line. Raises ValueError naming file and line where a line is not a JSON object."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open(encoding="utf-8") as lines:
        for at, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{at}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{at}: expected a JSON object, got {type(row).__name__}: {line.strip()[:80]}")
            yield f"{path}:{at}", row


def hf_rows(place: str, split: str, subset: str) -> Iterator[Row]:
    """Rows of a data set on the Hub, of a folder of data files, or of one written by `save_to_disk`.

    subset: "" for the only one. Raises ValueError on an unknown place, split or subset, RuntimeError when
    `datasets` is not installed.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]  # of the extra rlalign[datasets]
    except ModuleNotFoundError as error:
        raise RuntimeError(f"task hf:{place} needs the package: pip install 'datasets>=4'") from error
    folder = Path(place)
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():  # written by save_to_disk
            saved = datasets.load_from_disk(place)
            table: Iterable[dict[str, Any]] = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            table = datasets.load_dataset(place, subset or None, split=split)
    except (FileNotFoundError, KeyError, ValueError) as error:  # unknown name, split or subset
        raise ValueError(f"task hf:{place} (split {split!r}, subset {subset!r}) cannot be loaded: {error}") from error
    for index, row in enumerate(table):
        yield f"{place}[{split}] row {index}", row


def cell(row: Mapping[str, Any], name: str, where: str) -> str:
    """A field as text. Raises ValueError when it is absent, empty, or neither text nor a number."""
    if name not in row:
        raise ValueError(f"{where}: no field {name!r}; it has {', '.join(map(str, row)) or 'none'}")
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError(f"{where}: field {name!r} must be non-empty text or a number, got {value!r}")
    return str(value)


def number(text: str) -> Decimal | None:
    """The number that the whole text spells, thousands separators allowed; None when it is not a finite number."""
    try:
        value = Decimal(text.strip().replace(",", ""))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return number(found[-1]) if found else None


# What makes an answer right, given the reference: the same text; the same number ("1,000" is "1000.0");
# the last number of a longer text.
MATCHERS: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda reference, answer: answer == reference,
    "numeric": lambda reference, answer: number(answer) == number(reference),
    "last_number": lambda reference, answer: _last_number(answer) == number(reference),
}
