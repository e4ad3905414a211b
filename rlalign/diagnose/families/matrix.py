"""The matrix of `rlalign families`: every family through every cell, each engine in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlalign.diagnose.families import building
from rlalign.diagnose.families.cell import FAILED, OK, PROCESSES, Cell
from rlalign.diagnose.families.recipes import Recipe


def examine(
    families: Mapping[str, Recipe],
    columns: Sequence[str],
    *,
    timeout_s: float,
    say: Callable[[str, dict[str, Cell]], None],
) -> dict[str, dict[str, Cell]]:
    """The table; say: told each family's row when it is done."""
    table = {}
    for name, recipe in families.items():
        with tempfile.TemporaryDirectory(prefix=f"rlalign-{name}-") as folder:
            table[name] = row(recipe, Path(folder), columns, timeout_s)
        say(name, table[name])
    return table


def row(recipe: Recipe, folder: Path, columns: Sequence[str], timeout_s: float) -> dict[str, Cell]:
    """The cells of one family. Columns behind one that they stand on and that failed stay empty."""
    try:
        model = building.build(recipe, folder / "model")
    except Exception as error:  # a family that this transformers does not have, or builds in another way
        return {columns[0]: Cell(FAILED, f"{type(error).__name__}: {error}"[:300])}
    cells: dict[str, Cell] = {}
    for process, names in PROCESSES.items():
        if wanted := [n for n in names if n in columns]:
            found = _engine(model, process, wanted, folder / "found.json", timeout_s)
            cells |= {n: c for n, c in found.items() if n in wanted or c.state != OK}
    return cells


def _engine(model: Path, process: str, wanted: Sequence[str], out: Path, timeout_s: float) -> dict[str, Cell]:
    module = "rlalign.diagnose.families.engine_cells"
    out.write_text("{}")
    words = [sys.executable, "-m", module, str(model), process, ",".join(wanted), str(out)]
    code, said = _run(words, out.parent, timeout_s)
    found = {name: Cell(**plain) for name, plain in json.loads(out.read_text()).items()}
    if code and all(c.state == OK for c in found.values()):
        missing = next((n for n in wanted if n not in found), wanted[-1])
        found[missing] = Cell(FAILED, said)
    return found


def _run(words: list[str], folder: Path, timeout_s: float) -> tuple[int, str]:
    """Exit code, and the last line of what was said."""
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {timeout_s:g} s"
    lines = [line for line in done.stderr.splitlines() if line.startswith(("rlalign:", "RuntimeError", "ValueError"))]
    lines = lines or [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    return done.returncode, lines[-1][:300]
