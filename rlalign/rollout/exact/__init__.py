"""Exact mode of the rollout engine: vLLM computing with `rlalign.head.exact`, through its own extension points.

layers puts out-of-tree classes into vLLM's slots for linear layers, lm_head, norms and rope (`register_oot`); attention overrides
the CPU attention backend (`register_backend`). Both act only in engines that are built while RLALIGN_EXACT=1, which their workers
inherit; proof says of a live engine what is still vLLM's own.
"""

from __future__ import annotations

import os

VARIABLE = "RLALIGN_EXACT"
MODE = "exact"  # what an exact engine's head says of itself


def enabled() -> bool:
    """True while engines are to be built exact."""
    return os.environ.get(VARIABLE) == "1"
