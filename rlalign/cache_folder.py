"""Where rlalign keeps what it builds once and can build again: tiny models, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The folder of one kind of thing, under $RLALIGN_CACHE or ~/.cache/rlalign. It need not exist yet."""
    return Path(os.environ.get("RLALIGN_CACHE") or Path.home() / ".cache" / "rlalign") / kind
