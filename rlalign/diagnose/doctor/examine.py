"""All groups of checks, in the order in which a mistake would bite."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from rlalign.config import RunConfig
from rlalign.diagnose.doctor import check, live, machine, tokens
from rlalign.diagnose.doctor.check import Check, guarded
from rlalign.diagnose.families import cell
from rlalign.diagnose.families.recipes import RECIPES
from rlalign.run.assembly import resolve_model
from rlalign.tracking.stages import Stages

STAGES = 7  # the cheap checks, then those of live.engine_and_trainer


def examine(config: RunConfig) -> list[Check]:
    """Every check on this configuration. Starts the engine and loads the trainer's model once."""
    with Stages("doctor", STAGES) as stages:
        stages.stage("installation, machine, tokenizer")
        return _examined(config, stages.stage)


def _examined(config: RunConfig, say: Callable[[str], None]) -> list[Check]:
    return [
        *guarded("installation", lambda: machine.packages(config)),
        *guarded("vllm plugin", machine.plugin),
        *guarded("disk", lambda: machine.disks(config)),
        *guarded("clock", lambda: machine.clock(config)),
        *guarded("head memory", lambda: machine.head_memory(config)),
        *guarded("checkpoint", lambda: check.of_checkpoint(config)),
        *guarded("family", lambda: of_family(config)),
        *guarded("bf16 products", lambda: machine.products(config)),
        *guarded("tokenizer", lambda: tokens.tokenizer(config)),
        *guarded("engine", lambda: live.engine_and_trainer(config, say)),
    ]


TABLE = Path(cell.__file__).with_name("table.json")  # by `rlalign families --json`, on the versions that it names


def of_family(config: RunConfig) -> Iterator[Check]:
    """One line about the family; a cell of it that is not sound is unknown for this model, and said."""
    about = json.loads((resolve_model(config.model.path, say=lambda _: None) / "config.json").read_text())
    yield judged_family(str(about.get("text_config", about).get("model_type", "")), cell.read(TABLE))


def judged_family(model_type: str, table: dict[str, dict[str, cell.Cell]]) -> Check:
    """From the rows of this model type."""
    rows = {name: table[name] for name, recipe in RECIPES.items() if recipe.model_type == model_type and name in table}
    if not rows:
        found = (
            f"{model_type}: no tiny model of it was measured; `rlalign doctor` and `rlalign parity` measure this one"
        )
        return Check("family", "unknown", found)
    every = [(name, column, c) for name, cells in rows.items() for column, c in cells.items()]
    unsound = [f"{name}, {column}: {c.state}, {c.found}" for name, column, c in every if c.state != cell.OK]
    if unsound:
        return Check(
            "family", "unknown", f"on a tiny model: {'; '.join(unsound)}", f"rlalign families {' '.join(rows)}"
        )
    sound = ", ".join(f"{column} {c.found.split(';')[0]}".strip() for _, column, c in every)
    return Check("family", "ok", f"{', '.join(rows)} on a tiny model: {sound}")
