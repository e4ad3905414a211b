"""What the checkpoint's config.json asks of head and attention, and what becomes of it in this run."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rlalign.config import HeadDtype, RunConfig
from rlalign.diagnose.doctor.check import Check
from rlalign.run.assembly import resolve_model
from rlalign.trainer.attention_choice import SOFT_CAP, choose


def of_checkpoint(config: RunConfig) -> Iterator[Check]:
    """The head dtype that it claims and the cap of its attention scores. Raises ValueError for an attention that leaves it out."""
    about = json.loads((resolve_model(config.model.path, say=lambda _: None) / "config.json").read_text())
    yield head_dtype(about, config)
    text = about.get("text_config", about)
    chosen = choose(text, config.trainer.attention, setting="trainer.attention")
    cap = f"scores capped at {text[SOFT_CAP]:g}" if text.get(SOFT_CAP) else "scores not capped"
    why = f" for {chosen.why}" if chosen.why else ""
    yield Check("attention", "ok", f"{cap}; trainer computes with {chosen.name or 'the choice of transformers'}{why}")


def head_dtype(about: dict[str, object], config: RunConfig) -> Check:
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
