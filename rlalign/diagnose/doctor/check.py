"""One answer of the doctor, groups of them, and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlalign.config import HeadDtype, RunConfig
from rlalign.diagnose.both_sides import model_folder
from rlalign.trainer.attention_choice import SOFT_CAP, choose

STATES = ("ok", "problem", "unknown")


@dataclass(frozen=True, slots=True)
class Check:
    """One answer. state: ok, problem or unknown (could not be looked at, which is not the same as fine)."""

    name: str
    state: str
    found: str
    remedy: str = ""


def judged(name: str, fine: bool, found: str, remedy: str) -> Check:
    """ok, or a problem with its remedy."""
    return Check(name, "ok" if fine else "problem", found, "" if fine else remedy)


def guarded(name: str, checks: Callable[[], Iterator[Check]]) -> list[Check]:
    """The checks of a group. An error of ours is a problem with its own remedy in the message, and ends only this group."""
    found = []
    try:
        for check in checks():
            found.append(check)
    except (ValueError, RuntimeError, OSError) as error:
        found.append(Check(name, "problem", str(error)))
    return found


def report(checks: Sequence[Check]) -> str:
    """One line a check, and one more where something is to be done."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:8} {check.name:{width}}  {check.found}")
        lines += [f"{'':8} {'':{width}}  -> {check.remedy}"] if check.remedy else []
    counts = {state: sum(c.state == state for c in checks) for state in STATES}
    return "\n".join([*lines, "", ", ".join(f"{n} {state}" for state, n in counts.items())])


def as_json(checks: Sequence[Check]) -> str:
    """The checks as a JSON list."""
    return json.dumps([asdict(check) for check in checks], indent=2)


def read_config(model: Path) -> dict[str, Any]:
    """A model folder's config.json."""
    return json.loads((model / "config.json").read_text())


def text_config(model: Path) -> dict[str, Any]:
    """What it says of the language model, where a model has several parts."""
    about = read_config(model)
    return about.get("text_config", about)


def of_checkpoint(config: RunConfig) -> Iterator[Check]:
    """The head dtype that it claims and the cap of its attention scores. Raises ValueError for an attention that leaves it out."""
    about, text = read_config(model_folder(config)), text_config(model_folder(config))
    yield head_dtype(about, config)
    chosen = choose(text, config.trainer.attention, setting="trainer.attention")
    cap = f"scores capped at {text[SOFT_CAP]:g}" if text.get(SOFT_CAP) else "scores not capped"
    why = f" for {chosen.why}" if chosen.why else ""
    yield Check("attention", "ok", f"{cap}; trainer computes with {chosen.name or 'the choice of transformers'}{why}")


def head_dtype(about: dict[str, Any], config: RunConfig) -> Check:
    """vLLM would follow `head_dtype` (and Hy-V4's `enable_lm_head_fp32`), transformers would not; a run has one for both."""
    claimed = about.get("head_dtype") or ("float32" if about.get("enable_lm_head_fp32") else None)
    ours = config.model.dtype.value if config.head_dtype is HeadDtype.model else "float32"
    name = "head_dtype of the checkpoint"
    if claimed in (None, "model"):
        return Check(name, "ok", f"none claimed; both sides multiply in {ours}")
    wide = str(claimed).removeprefix("torch.") == ours
    found = f"config.json claims {claimed}; both sides multiply in {ours}, by head_dtype={config.head_dtype.value}"
    return Check(
        name, "ok", found, "" if wide else "head_dtype=float32 multiplies as the checkpoint is meant to be served"
    )
