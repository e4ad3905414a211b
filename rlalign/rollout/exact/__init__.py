"""Exact mode of the rollout engine: vLLM computing with `rlalign.exact`, through its own extension points.

layers puts out-of-tree classes into vLLM's slots for linear layers, lm_head, norms and rope (`register_oot`); attention overrides
the CPU attention backend (`register_backend`). Both act only in engines that are built while RLALIGN_EXACT=1.
"""

from __future__ import annotations

import os

VARIABLE = "RLALIGN_EXACT"


def enabled() -> bool:
    """True while engines are to be built exact."""
    return os.environ.get(VARIABLE) == "1"


def register() -> None:
    """Put our classes in place, in every process that builds a model. Idempotent.

    Raises RuntimeError where another plugin holds one of the slots, or on another device than the CPU.
    """
    from rlalign import exact
    from rlalign.rollout.exact import attention, layers

    exact.require_reproducible()
    layers.register()
    attention.register()
