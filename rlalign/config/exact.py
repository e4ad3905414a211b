"""What exact mode asks of the rest of the configuration; the model and the machine are asked when they are loaded."""

from __future__ import annotations

from rlalign.config.checks import require
from rlalign.config.model import HeadDtype
from rlalign.config.rollout import RolloutConfig
from rlalign.config.trainer import TrainerConfig


def require_exact_possible(head_dtype: HeadDtype, rollout: RolloutConfig, trainer: TrainerConfig) -> None:
    """Raise ValueError naming what stands against `exact: true`."""
    require(
        head_dtype is HeadDtype.float32,
        f"exact=true with head_dtype={head_dtype.value}: exact mode computes float32 logits from the published weights on both "
        "sides; use head_dtype=float32",
    )
    require(
        rollout.tensor_parallel_size == 1,
        f"exact=true with rollout.tensor_parallel_size={rollout.tensor_parallel_size}: the all-reduce adds partial products in "
        "another order than one trainer does; use 1",
    )
    require(
        rollout.enforce_eager and rollout.head_mode == "auto",
        f"exact=true with rollout.enforce_eager={rollout.enforce_eager}, rollout.head_mode={rollout.head_mode}: a compiled model "
        "rearranges the sums that exact mode fixes, and its head is its own; use enforce_eager=true and head_mode=auto",
    )
    require(
        trainer.lora.rank == 0,
        f"exact=true with trainer.lora.rank={trainer.lora.rank}: adapters are merged in the engine, not in the trainer; use rank=0",
    )
    require(
        trainer.pack_tokens == 0 and trainer.attention in ("auto", "sdpa"),
        f"exact=true with trainer.pack_tokens={trainer.pack_tokens}, trainer.attention={trainer.attention}: exact mode has an "
        "attention of its own, over padded rows; use pack_tokens=0 and attention=auto",
    )
