"""Where rlalign keeps what it builds once and can build again: tiny models, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "RLALIGN_CACHE"


def cache_folder(kind: str) -> Path:
    """The folder of one kind of thing, under $RLALIGN_CACHE or ~/.cache/rlalign. It need not exist yet."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "rlalign") / kind
