"""The matrix of `rlalign families`: every family through every cell, each engine in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rlalign.diagnose.families import building
from rlalign.diagnose.families.cell import FAILED, OK, PROCESSES, Cell
from rlalign.diagnose.families.recipes import Recipe

# Imported once, in the server that every process is forked from: they take longer than the cells of a tiny model.
HEAVY = [
    "vllm.entrypoints.llm", "vllm.v1.engine.core", "rlalign.rollout.engine.embedded", "rlalign.trainer.policy",
    "rlalign.diagnose.attribution.measure", "rlalign.run.step", "rlalign.run.assembly",
]  # fmt: skip


def examine(
    families: Mapping[str, Recipe],
    columns: Sequence[str],
    *,
    timeout_s: float,
    say: Callable[[str, dict[str, Cell]], None],
) -> dict[str, dict[str, Cell]]:
    """The table; say: told each family's row when it is done."""
    from rlalign.rollout.engine.embedded import EMBEDDED_ENVIRONMENT

    for name, value in (EMBEDDED_ENVIRONMENT | {"TORCHDYNAMO_DISABLE": "1"}).items():  # read when HEAVY is imported
        os.environ.setdefault(name, value)
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
    from rlalign.diagnose.families import engine_cells

    out.write_text("{}")
    said = out.with_suffix(".log")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    child = context.Process(target=engine_cells.run, args=(model, process, list(wanted), out, said))
    child.start()
    child.join(timeout_s)
    late = child.is_alive()
    if late:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with the processes of its engine
        child.kill()
        child.join()
    found = {name: Cell(**plain) for name, plain in json.loads(out.read_text()).items()}
    if child.exitcode and all(c.state == OK for c in found.values()):
        missing = next((n for n in wanted if n not in found), wanted[-1])
        reason = f"no answer within {timeout_s:g} s" if late else last_line(said, child.exitcode)
        found[missing] = Cell(FAILED, reason)
    return found


def last_line(file: Path, code: int) -> str:
    """What a process that ended with this code said last."""
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()] if file.is_file() else []
    told = [line for line in lines if line.startswith(("rlalign:", "RuntimeError", "ValueError"))]
    return (told or lines or [f"exit code {code}"])[-1][:300]
