"""Exact mode on: engines built inside `building` are exact, in processes of their own through `register`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from rlalign.rollout.exact import VARIABLE


@contextmanager
def building(wanted: bool) -> Iterator[None]:
    """Engines built inside are exact, or vLLM's own, whatever the environment says; afterwards it says what it said.

    Raises RuntimeError where this machine, its device or another plugin does not allow exact mode.
    """
    before = os.environ.pop(VARIABLE, None)
    try:
        with ExitStack() as stack:
            if wanted:
                register()
                os.environ[VARIABLE] = "1"
                from rlalign.rollout.exact.layers import rope_cache_of_its_own

                stack.enter_context(rope_cache_of_its_own())
            yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def register() -> None:
    """Put our classes in place, in every process that builds a model. Idempotent.

    Raises RuntimeError where another plugin holds one of the slots, or on another device than the CPU.
    """
    from rlalign.head import exact
    from rlalign.rollout.exact import attention, layers

    exact.require_reproducible()
    attention.register()
    layers.register()
