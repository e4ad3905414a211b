"""Which settings of TRL leave the two sides comparable, and what its correction is called here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate.utils import is_peft_model

from rlalign.integrations import require_tested

if TYPE_CHECKING:
    from trl import GRPOConfig, GRPOTrainer, RLOOTrainer

__all__ = ["correction_of", "require_settings", "require_version", "sampling_of"]

TESTED = ("1.16",)
ALLOW_UNTESTED = "RLALIGN_ALLOW_UNTESTED_TRL"


def require_version(found: str) -> None:
    """Raise RuntimeError for a TRL that this adapter was not tried on, unless RLALIGN_ALLOW_UNTESTED_TRL=1."""
    does = "replaces methods of its trainers and of VLLMGeneration"
    require_tested("TRL", found, TESTED, allow=ALLOW_UNTESTED, does=does, own="subclass")


def require_settings(trainer: GRPOTrainer | RLOOTrainer, *, weights: str) -> None:
    """Raise ValueError for the setting that would leave engine and model apart, or that was not tried, by its name."""
    args, generation = trainer.args, getattr(trainer, "vllm_generation", None)
    wrong = None
    if weights not in ("publish", "verify"):
        wrong = f'weights={weights!r}: "publish" (read back) or "verify" (TRL pushes, every tensor is compared)'
    elif generation is None:
        wrong = "use_vllm=False: there is no second engine to align with"
    elif generation.mode == "server" and trainer.accelerator.num_processes > 1:
        wrong = 'vllm_mode="server" with several trainer processes: only the first of them talks to the server; use one'
    elif generation.mode == "colocate" and generation.tensor_parallel_size > 1:
        wrong = "vllm_tensor_parallel_size > 1: each process sees its own worker only; use 1 (one engine a process)"
    elif not getattr(args, "vllm_importance_sampling_correction", True):  # RLOOConfig has none, and always recomputes
        wrong = (
            "vllm_importance_sampling_correction=False: then nothing recomputes the logprobs to compare; leave it True"
        )
    elif getattr(trainer, "_is_vlm", False):
        wrong = "a model with images: this adapter scores text only"
    elif weights == "verify" and is_peft_model(trainer.model):
        wrong = (
            'weights="verify" with PEFT: TRL merges and unmerges in place, which moves 16-bit base weights a little each time, so '
            'that nothing stays to compare with; use weights="publish", which merges in float32 beside them'
        )
    if wrong is not None:
        raise ValueError(f"rlalign.integrations.trl: {wrong}")


def sampling_of(trainer: GRPOTrainer | RLOOTrainer) -> dict[str, object]:
    """What TRL asks vLLM to sample with, under vLLM's names."""
    generation = trainer.vllm_generation
    found = {
        name: getattr(generation, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    }
    return found | {"structured_outputs": generation.structured_outputs_regex} | generation.generation_kwargs


def correction_of(args: GRPOConfig) -> dict[str, object] | None:
    """TRL's importance sampling correction as arguments of `rlalign.correct`; None where it is switched off.

    A token or sequence that TRL gives the ratio 0 is out of `Correction.keep` there. Raises ValueError for an unknown mode.
    """
    if not args.vllm_importance_sampling_correction:
        return None
    level, _, kind = args.vllm_importance_sampling_mode.partition("_")
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    if level not in ("token", "sequence") or kind not in ("truncate", "mask"):
        raise ValueError(
            f"vllm_importance_sampling_mode={args.vllm_importance_sampling_mode!r}; known are token_truncate, token_mask, "
            "sequence_truncate and sequence_mask"
        )
    mode = "mask" if kind == "mask" else "truncate" if low is None else "clip"
    return {"level": level, "mode": mode, "low": low, "high": high}
