"""The shipped configurations, composed by Hydra and checked against the schema."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The shipped Hydra configuration with overrides applied. Raises ValueError with one readable line."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register_schema()
    try:
        with initialize_config_module("rlalign.configs", version_base="1.3"):
            return hydra_compose(config_name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"configuration: {_readable(error)}") from error


def _readable(error: Exception) -> str:
    """The first line that says something: Hydra keeps the reason in the cause and appends search paths and advice."""
    what = str(error).split("Config search path")[0].split("To append to your config")[0]
    why = str(error.__cause__ or "").split("\n")[0]
    return f"{' '.join(what.split()).rstrip('.')}{': ' if why else ''}{why}"


@cache
def register_schema() -> None:
    """Give Hydra the dataclasses, so that unknown keys and wrong types are refused while composing, and `correction=PRESET`.

    It stands beside `algo=NAME`, so that a loss and a correction can both be said.
    """
    from hydra.core.config_store import ConfigStore

    from rlalign.config import PRESETS, RunConfig

    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)
    for name in ("none", *PRESETS):  # none: what `algo` says stays
        chosen = {} if name == "none" else {"preset": name}
        store.store(group="correction", name=name, node=chosen, package="algo.correction")
