"""The variable that says whether an engine is built exact."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "RLALIGN_EXACT"
MODE = "exact"  # what an exact engine's head says of itself


def enabled() -> bool:
    """True while engines are to be built exact."""
    return os.environ.get(VARIABLE) == "1"


@contextmanager
def asked_by(variable: str, wanted: bool) -> Iterator[None]:
    """Inside, this variable is 1 or not there, as wanted; afterwards it says what it said."""
    before = os.environ.pop(variable, None)
    if wanted:
        os.environ[variable] = "1"
    try:
        yield
    finally:
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before
