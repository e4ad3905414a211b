"""A cell of the matrix, and the matrix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

OK, REFUSED, FAILED = "ok", "refused", "failed"
# The cells that one process answers, in the order in which it does; a process is an engine.
PROCESSES: dict[str, tuple[str, ...]] = {
    "float32": ("head", "load", "score", "publish", "attribute", "train", "ZeRO-3", "LoRA"),
    "bfloat16": ("bfloat16", "bfloat16 publish"),
    "TP 2": ("TP 2",),
}
COLUMNS = tuple(column for columns in PROCESSES.values() for column in columns)


@dataclass(frozen=True, slots=True)
class Cell:
    """state: ok, refused (by name, before anything ran) or failed; found: a number, or the reason."""

    state: str
    found: str = ""


Cells = Mapping[str, Cell]  # of one family, by column


def as_markdown(table: Mapping[str, Cells]) -> str:
    """One row a family; the reasons below, by number."""
    columns = [c for c in COLUMNS if any(c in cells for cells in table.values())]
    lines = [f"| family | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    reasons: list[str] = []
    for family, cells in table.items():
        lines.append(f"| {family} | {' | '.join(_shown(cells.get(c), reasons) for c in columns)} |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])


def read(file: Path) -> dict[str, dict[str, Cell]]:
    """A table that `write` wrote; empty without one."""
    found = json.loads(file.read_text()) if file.is_file() else {}
    return {family: {column: Cell(**cell) for column, cell in cells.items()} for family, cells in found.items()}


def write(table: Mapping[str, Cells], file: Path) -> None:
    """As JSON."""
    plain = {family: {column: asdict(cell) for column, cell in cells.items()} for family, cells in table.items()}
    file.write_text(json.dumps(plain, indent=1) + "\n")


def _shown(cell: Cell | None, reasons: list[str]) -> str:
    if cell is None:
        return "-"
    if cell.state == OK:
        return cell.found or "ok"
    if cell.found not in reasons:
        reasons.append(cell.found)
    return f"**{cell.state}** ({reasons.index(cell.found) + 1})"
