"""Exact mode of the rollout engine: vLLM computing with `rlalign.head.exact`, through its own extension points (`layers`).

It acts only in engines that are built while RLALIGN_EXACT=1, which their workers inherit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from rlalign.rollout.exact.switch import MODE, VARIABLE, asked_by, enabled

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import VllmConfig

__all__ = [
    "MODE",
    "REPLACED",
    "VARIABLE",
    "asked_by",
    "attention_classes",
    "building",
    "enabled",
    "not_exact",
    "register",
]
# Classes of these names must be ours in an exact engine, scaled rope, other norms and routers among them
REPLACED = ("Linear", "LMHead", "RMSNorm", "RotaryEmbedding", "AndMul")


@contextmanager
def building(wanted: bool) -> Iterator[None]:
    """Engines built inside are exact, or vLLM's own, whatever the environment says; afterwards it says what it said.

    Raises RuntimeError where this machine, its device or another plugin does not allow exact mode.
    """
    with ExitStack() as stack:
        stack.enter_context(asked_by(VARIABLE, wanted))
        if wanted:
            register()
            from rlalign.rollout.exact.layers import rope_cache_of_its_own

            stack.enter_context(rope_cache_of_its_own())
        yield


def register() -> None:
    """Put our classes in place, in every process that builds a model. Idempotent.

    Raises RuntimeError where another plugin holds one of the slots, or on another device than the CPU.
    """
    from rlalign.head import exact
    from rlalign.rollout.exact import layers

    exact.require_reproducible()
    layers.register_attention()
    layers.register_layers()


def attention_classes(config: VllmConfig) -> list[str]:
    """Class of every attention layer's implementation, which is no module of its own."""
    layers = config.compilation_config.static_forward_context.values()
    return sorted({type(layer.impl).__qualname__ for layer in layers if hasattr(layer, "impl")})


def not_exact(model: nn.Module, config: VllmConfig) -> list[str]:
    """Classes that compute here and are not those of exact mode; empty in an engine that is exact."""
    classes = {type(m).__qualname__ for m in model.modules() if type(m).__qualname__.endswith(REPLACED)}
    return sorted(c for c in classes | set(attention_classes(config)) if not c.startswith("Exact"))
