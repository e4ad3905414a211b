"""Settings of ours that cannot be, refused where the user stands: before vLLM starts a process or reads a weight.

Raised in a worker, the same words would be 160 lines up in its log, under "Engine core initialization failed". What the environment
asks is written into additional_config here, which reaches every worker: Ray and data-parallel ones do not inherit our variables.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from rlalign.rollout.names import SETTINGS_KEY


def installed() -> bool:
    """True where vLLM's engine arguments are checked already."""
    build = EngineArgs.create_engine_config
    return hasattr(build, "__wrapped__") and build.__module__ == __name__


def install() -> None:
    """Let vLLM's engine arguments check what is asked of us, when they become a configuration. Idempotent."""
    if installed():
        return
    build = EngineArgs.create_engine_config

    @functools.wraps(build, assigned=("__name__", "__qualname__", "__doc__"))
    def checked(self: EngineArgs, *args: object, **kwargs: object) -> VllmConfig:
        config = build(self, *args, **kwargs)
        settle(config)
        return config

    EngineArgs.create_engine_config = checked


def settle(config: VllmConfig) -> None:
    """Check what this engine is asked, and write down what only the environment asks.

    Raises ValueError for settings that are none or cannot be here, RuntimeError for a vLLM outside the tested range or another
    plugin's head in this process.
    """
    from rlalign.rollout.head import rivals
    from rlalign.rollout.head.head_settings import HeadMode, HeadSettings
    from rlalign.rollout.head.logits_processor import mode_of

    if config.model_config.runner_type == "pooling":
        return  # has no head
    if mode_of(config) is not HeadMode.OFF:
        rivals.require_none()
    if HeadSettings.of_engine(config.additional_config) is not None:
        return
    asked = HeadSettings.of_environment(os.environ)
    if asked is None:
        return
    if not isinstance(config.additional_config, Mapping):
        raise ValueError(
            f"RLALIGN_HEAD={asked.head_dtype} needs an additional_config that is a dictionary, to reach every worker; this "
            f"engine's is a {type(config.additional_config).__name__}. Unset the variable, or pass a dictionary"
        )
    config.additional_config = {**config.additional_config, SETTINGS_KEY: asked.as_dict()}
