"""All groups of checks, in the order in which a mistake would bite."""

from __future__ import annotations

from collections.abc import Callable

from rlalign.config import RunConfig
from rlalign.diagnose.doctor import check, family, live, machine, tokens
from rlalign.diagnose.doctor.check import Check, guarded
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
        *guarded("family", lambda: family.of_checkpoint(config)),
        *guarded("bf16 products", lambda: machine.products(config)),
        *guarded("tokenizer", lambda: tokens.tokenizer(config)),
        *guarded("engine", lambda: live.engine_and_trainer(config, say)),
    ]
