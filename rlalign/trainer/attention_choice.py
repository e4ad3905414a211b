"""Which attention may compute a model: some implementations leave out what the configuration asks for, without a word.

Read from transformers 5.16 to 5.19, run on 5.19. Soft-capped scores (Gemma-2, VaultGemma) are dropped by its sdpa, which takes any
option and applies none of these; eager, flex and flash attention apply them, as vLLM does. Models with sinks (GPT-OSS, Granite-SWA,
MiMo-V2) refuse sdpa themselves, and sliding windows are in the masks of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

SOFT_CAP = "attn_logit_softcapping"
DROPS_SOFT_CAP = ("sdpa",)
FLEX_WRONG_SIZES = (8, 16)  # of a head, on AVX2: whole vectors, and below the 24 from which torch takes another kernel


@dataclass(frozen=True, slots=True)
class Choice:
    """name: for transformers' attn_implementation, None for its own choice. why: empty where nothing had to be decided."""

    name: str | None
    why: str = ""


def caps_scores(config: Mapping[str, object]) -> bool:
    """Does a model with this text config cap its attention scores?"""
    return bool(config.get(SOFT_CAP))


def flex_fault(config: Mapping[str, object], *, on_cpu: bool) -> str:
    """Why torch's FlexAttention computes this model wrongly here; empty where it does not.

    Compiled for AVX2, heads of 8 or 16 elements: sequences whose last block of keys holds 8 more than a multiple of 16 read and
    write past their end (seen in torch 2.13.0; docs/upstream.md).
    """
    size = config.get("head_dim") or int(config.get("hidden_size") or 0) // int(config.get("num_attention_heads") or 1)
    if on_cpu and size in FLEX_WRONG_SIZES and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return f"torch's flex attention compiled for AVX2 is wrong for heads of {size} elements (docs/upstream.md)"
    return ""


def choose(
    config: Mapping[str, object], asked: str, *, setting: str = "attention", on_cpu: bool | None = None
) -> Choice:
    """The implementation for a model with this text config (as a mapping). asked: a name of transformers, or "auto".

    on_cpu: None where the model lies on a GPU if there is one. Raises ValueError for one asked for by name that would leave
    something out or compute wrongly; setting: what the user calls it.
    """
    on_cpu = not torch.cuda.is_available() if on_cpu is None else on_cpu
    if asked == "flex_attention" and (fault := flex_fault(config, on_cpu=on_cpu)):
        other = "eager" if caps_scores(config) else "auto (sdpa, which packs rows too)"
        raise ValueError(f"{setting}={asked}: {fault}; use {other}")
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
