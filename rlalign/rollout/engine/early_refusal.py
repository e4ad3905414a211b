"""Settings of ours that cannot be, refused where the user stands: before vLLM starts a process or reads a weight.

Raised in a worker, the same words would be 160 lines up in its log, under "Engine core initialization failed".
"""

from __future__ import annotations

import functools

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs


def install() -> None:
    """Let vLLM's engine arguments check what additional_config asks of us, when they become a configuration. Idempotent."""
    build = EngineArgs.create_engine_config
    if hasattr(build, "__wrapped__") and build.__module__ == __name__:
        return

    @functools.wraps(build, assigned=("__name__", "__qualname__", "__doc__"))
    def checked(self: EngineArgs, *args: object, **kwargs: object) -> VllmConfig:
        from rlalign.rollout.head.logits_processor import mode_of

        config = build(self, *args, **kwargs)
        mode_of(config)
        return config

    EngineArgs.create_engine_config = checked
