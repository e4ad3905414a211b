"""How a run directory is written and read: strict JSON, whole lines, atomic files, one lock per live run."""

from __future__ import annotations

import fcntl
import json
import math
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any

SCHEMA_VERSION = 1
RUN, CONFIG, ENVIRONMENT, SUMMARY, HEAD_STATUS = (
    "run.json",
    "config.json",
    "environment.json",
    "summary.json",
    "head_status.json",
)
METRICS, EVENTS, TIMELINE, TOKENS = "metrics.jsonl", "events.jsonl", "timeline.jsonl", "tokens"
ATTRIBUTION = "attribution.json"
NONFINITE = "nonfinite"


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace `path` in one move, so that a reader sees the old content or the new, never a half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
    os.replace(temporary, path)


def jsonable(value: Any, where: str) -> Any:
    """Plain JSON types only. Paths become text, enums their value, NaN and infinities the text "nan", "inf", "-inf".

    Raises ValueError naming the place for anything else: a config that cannot be written cannot be reproduced.
    """
    if isinstance(value, Enum):
        return jsonable(value.value, where)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [jsonable(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, dict):
        if bad := [k for k in value if not isinstance(k, str)]:
            raise ValueError(f"{where}: keys must be text; got {bad[0]!r}")
        return {k: jsonable(v, f"{where}.{k}") for k, v in value.items()}
    raise ValueError(f"{where}: {type(value).__name__} cannot be stored as JSON; convert it to numbers, text or lists")


def write_json(path: Path, value: object) -> None:
    """Atomic, indented, strict JSON."""
    write_atomic(path, json.dumps(jsonable(value, path.name), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError naming the file when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is not a complete run directory: {path.name} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def encode_row(row: dict[str, float]) -> str:
    """One line of metrics. Non-finite values become null and are named with their kind under "nonfinite"."""
    lost = {key: repr(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    line: dict[str, Any] = {key: None if key in lost else value for key, value in row.items()}
    if lost:
        line[NONFINITE] = lost
    return json.dumps(line, allow_nan=False)


def decode_row(line: dict[str, Any]) -> dict[str, float]:
    """The row that `encode_row` wrote, NaN and infinities included."""
    lost: dict[str, str] = line.get(NONFINITE, {})
    return {k: v for k, v in line.items() if k != NONFINITE} | {k: float(v) for k, v in lost.items()}


@dataclass(frozen=True, slots=True)
class Lines:
    """Rows of a JSON-lines file. torn: text after the last newline that is no JSON, left by a killed writer, or None.

    whole_bytes: length of the file up to the end of its last whole line.
    """

    rows: tuple[dict, ...]
    torn: str | None
    whole_bytes: int


def read_lines(path: Path) -> Lines:
    """Every row of a JSON-lines file; a missing file has none.

    Tolerates exactly one damage: an unfinished last line without its newline. Raises ValueError, with the line number,
    for a bad line anywhere else, because that file was not damaged by a killed writer.
    """
    data = path.read_bytes() if path.exists() else b""
    rows, whole = [], 0
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            if whole + len(line) == len(data) and not line.endswith(b"\n"):
                return Lines(tuple(rows), line.decode("utf-8", "replace"), whole)
            raise ValueError(
                f"{path}, line {number}: {error}. Only the last line of a killed run can be torn"
            ) from None
        rows.append(row)
        whole += len(line)
    return Lines(tuple(rows), None, whole)


def hold_lock(directory: Path) -> IO[str] | None:
    """The lock of a live run; it falls when the process ends in any way. None when another process holds it.

    Raises OSError on a file system without flock.
    """
    handle = (directory / ".lock").open("a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    return handle


def is_live(directory: Path) -> bool:
    """True when a process holds the run's lock."""
    lock = directory / ".lock"
    if not lock.exists():
        return False
    with lock.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
