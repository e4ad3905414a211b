"""Which vLLM versions the head hooks were run on, and which hook fits which. One place decides; nothing sniffs attributes."""

from __future__ import annotations

import enum
import os

OLDEST = (0, 24)  # oldest minor release whose sources the hooks were checked against
NEWEST = (0, 33)  # newest minor release the engine tests ran on
ALLOW_UNTESTED = "RLALIGN_ALLOW_UNTESTED_VLLM"


class Hook(enum.Enum):
    """Where the head is replaced."""

    APPLY_HEAD = "_apply_head"  # 0.26 on: one method that everything goes through, LoRA too
    GET_LOGITS = "_get_logits, get_top_tokens"  # before: two methods call the lm_head's kernel themselves


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


def hook(version: str) -> Hook:
    """The hook for this version."""
    return Hook.APPLY_HEAD if parse(version) >= (0, 26) else Hook.GET_LOGITS


def has_native_head(version: str) -> bool:
    """True where vLLM itself can project in float32 (head_dtype of a generating model)."""
    return parse(version) >= (0, 26)


def has_weight_transfer(version: str) -> bool:
    """True where the weight-transfer interface is the one `rlalign.rollout.worker.gloo_transfer` implements."""
    return parse(version) >= (0, 28)


def keeps_lora_state(version: str) -> bool:
    """True where the model runner keeps LoRA state that new base weights invalidate (reset_lora_state)."""
    return parse(version) >= (0, 28)


def has_weight_version(version: str) -> bool:
    """True where the engine keeps a weight version (LLM.update_weight_version)."""
    return parse(version) >= (0, 27)


def has_output_spans(version: str) -> bool:
    """True where the engine itself reports weight-version spans for each output (CompletionOutput.weight_versions)."""
    return parse(version) >= (0, 32)
