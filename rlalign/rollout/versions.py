"""Which vLLM versions the hooks were run on, and what only some of them offer. One place decides; nothing sniffs attributes."""

from __future__ import annotations

import os

OLDEST = (0, 28)  # oldest minor release that the engine tests ran on
NEWEST = (0, 33)  # and the newest
ALLOW_UNTESTED = "RLALIGN_ALLOW_UNTESTED_VLLM"


def parse(version: str) -> tuple[int, int]:
    """(major, minor) of a version string such as "0.32.0" or "0.33.0rc1+cpu"; ValueError when it has neither."""
    parts = version.split("+")[0].split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (IndexError, ValueError):
        raise ValueError(
            f"vLLM version {version!r} does not start with MAJOR.MINOR; rlalign cannot choose its hooks"
        ) from None


def require_supported(version: str) -> None:
    """Raise RuntimeError outside the tested range. The newer side can be opened with RLALIGN_ALLOW_UNTESTED_VLLM=1."""
    found = parse(version)
    tested = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    if found < OLDEST:
        raise RuntimeError(
            f"vLLM {version} is older than the head hooks support ({tested}); install vllm>={OLDEST[0]}.{OLDEST[1]}"
        )
    if found > NEWEST and os.environ.get(ALLOW_UNTESTED) != "1":
        raise RuntimeError(
            f"vLLM {version} is newer than the versions the head hooks were tested on ({tested}). "
            f"Install a tested one, or set {ALLOW_UNTESTED}=1 and prove it with `rlalign parity`."
        )


def has_output_spans(version: str) -> bool:
    """True where the engine itself reports weight-version spans for each output (CompletionOutput.weight_versions)."""
    return parse(version) >= (0, 32)
