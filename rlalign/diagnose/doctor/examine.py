"""All groups of checks, in the order in which a mistake would bite."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    fields = about.get("text_config", about)
    yield judged_family(str(fields.get("model_type", "")), cell.read(TABLE))
    yield from of_latent_norms(fields)


def of_latent_norms(fields: dict[str, Any]) -> Iterator[Check]:
    """MiniCPM 3's latents: transformers norms them with its class's epsilon, vLLM with the configuration's (docs/upstream.md)."""
    own, given = 1e-6, fields.get("rms_norm_eps", 1e-5)
    if fields.get("model_type") != "minicpm3":
        return
    if given == own:
        yield Check("latent norms", "ok", f"rms_norm_eps={given:g} is the one that transformers gives the latents too")
        return
    found = f"vLLM norms the latents with rms_norm_eps={given:g}, transformers with {own:g}: 7e-05 nats on a tiny float32 model"
    yield Check(
        "latent norms",
        "problem",
        found,
        f"accept the gap, or set rms_norm_eps={own:g}, which moves every norm of both sides alike",
    )


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
