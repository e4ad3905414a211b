"""Which attention may compute a model: some implementations leave out what the configuration asks for, without a word.

Read from transformers 5.16 to 5.19, run on 5.19. Soft-capped scores (Gemma-2, VaultGemma) are dropped by its sdpa, which takes any
option and applies none of these; eager, flex and flash attention apply them, as vLLM does. Models with sinks (GPT-OSS, Granite-SWA,
MiMo-V2) refuse sdpa themselves, and sliding windows are in the masks of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SOFT_CAP = "attn_logit_softcapping"
DROPS_SOFT_CAP = ("sdpa",)


@dataclass(frozen=True, slots=True)
class Choice:
    """name: for transformers' attn_implementation, None for its own choice. why: empty where nothing had to be decided."""

    name: str | None
    why: str = ""


def caps_scores(config: Mapping[str, object]) -> bool:
    """Does a model with this text config cap its attention scores?"""
    return bool(config.get(SOFT_CAP))


def choose(config: Mapping[str, object], asked: str, *, setting: str = "attention") -> Choice:
    """The implementation for a model with this text config (as a mapping). asked: a name of transformers, or "auto".

    Raises ValueError for one asked for by name that would leave something out; setting: what the user calls it.
    """
    cap = config.get(SOFT_CAP)
    if not caps_scores(config):
        return Choice(None if asked == "auto" else asked)
    if asked == "auto":
        return Choice("eager", f"{SOFT_CAP}={cap:g} of the checkpoint, which sdpa would leave out")
    if asked in DROPS_SOFT_CAP:
        raise ValueError(
            f"{setting}={asked}: this checkpoint caps its attention scores ({SOFT_CAP}={cap:g}), which transformers' {asked} "
            "leaves out while vLLM applies it; use auto, eager, flex_attention or flash_attention_2"
        )
    return Choice(asked)


def of_folder(path: object, asked: str = "auto", *, setting: str = "attention", **options: object) -> Choice:
    """`choose` for a checkpoint; options: of transformers' AutoConfig.from_pretrained."""
    from transformers import AutoConfig

    return choose(AutoConfig.from_pretrained(path, **options).get_text_config().to_dict(), asked, setting=setting)
