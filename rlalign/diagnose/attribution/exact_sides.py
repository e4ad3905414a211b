"""Both sides in exact mode: prepared before the engine starts, proved afterwards."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import nn

from rlalign.config import RolloutConfig
from rlalign.rollout import exact, teacher_forcing
from rlalign.rollout.engine import VLLMEngine
from rlalign.trainer.exact import make_exact

# Classes of these names must be ours in an exact engine, scaled rope, other norms and routers among them
REPLACED = ("Linear", "LMHead", "RMSNorm", "RotaryEmbedding", "AndMul")


def prepare(network: nn.Module, rollout: RolloutConfig) -> str:
    """Make the trainer's model exact, and engines that are built from now on; returns the head dtype to start them with.

    "model": exact mode brings its own float32 head. Raises ValueError for tensor parallelism, whose all-reduce adds in another
    order, RuntimeError where the machine or another plugin does not allow it.
    """
    if rollout.tensor_parallel_size > 1:
        raise ValueError(
            f"exact mode with rollout.tensor_parallel_size={rollout.tensor_parallel_size}: the all-reduce adds partial products in "
            "another order than one trainer does; use 1"
        )
    exact.register()
    make_exact(network)
    os.environ[exact.VARIABLE] = "1"
    return "model"


def require_exact(engines: Sequence[VLLMEngine]) -> None:
    """Raise RuntimeError for an engine that was built with vLLM's own layers."""
    for engine in engines:
        classes = {c for c in teacher_forcing.modules(engine).values() if c.endswith(REPLACED)}
        classes |= set(teacher_forcing.attention(engine))
        if left := sorted(c for c in classes if not c.startswith("Exact")):
            raise RuntimeError(
                f"exact mode: the engine still runs vLLM's {', '.join(left)}: either exact mode does not know that layer, or the "
                "engine was built in a process that exact.register() did not reach (keep VLLM_ENABLE_V1_MULTIPROCESSING=0)"
            )


def end() -> None:
    """Engines that are built from now on are vLLM's own again."""
    os.environ.pop(exact.VARIABLE, None)
