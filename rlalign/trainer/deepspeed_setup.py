"""How DeepSpeed is set up: its settings, and the process group its ranks share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from rlalign import ranks
from rlalign.config import TrainerConfig

STATE_TAG = "state"  # DeepSpeed's folder inside a checkpoint


def deepspeed_settings(config: TrainerConfig, dtype: str) -> dict[str, object]:
    """DeepSpeed's configuration of the policy's engine."""
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": 1,  # boundaries are set by hand: the number of micro-batches follows the data
        "gradient_clipping": config.grad_clip,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,  # torch.optim.AdamW: DeepSpeed's own would compile a C++ kernel for a minute
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 2**31 - 1,
    }


def round_biased_layers_once() -> None:
    """Give ZeRO-3's linear layers the values of torch's: a 16-bit product with a bias is rounded once.

    `deepspeed.zero.Init` replaces `torch.nn.functional.linear`, for the whole process and for good, by one that keeps no
    gathered weight for the backward pass. For inputs of three dimensions that one rounds the product, adds the bias and rounds
    again (0.19.8); for two it is fused, so rows are flattened before it. See docs/upstream.md.
    """
    if F.linear is zero3_linear_wrap:
        F.linear = _linear_of_rows


def _linear_of_rows(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if bias is None or input.dim() <= 2:
        return zero3_linear_wrap(input, weight, bias)
    return zero3_linear_wrap(input.flatten(0, -2), weight, bias).unflatten(0, input.shape[:-1])


def adamw(parameters: Iterable[Parameter], config: TrainerConfig, *, lr: float) -> torch.optim.AdamW:
    """The optimizer of the policy and of the critic."""
    # Fused it takes a fifth of the time on CPU; on CUDA torch chooses, as by default.
    fused = None if torch.cuda.is_available() else True
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=config.weight_decay, fused=fused)


def load_checkpoint(
    engine: deepspeed.DeepSpeedEngine, folder: Path, config: TrainerConfig, *, lr: float, strict: bool = True
) -> dict | None:
    """Weights, optimizer and schedule as `save_checkpoint` left them; its client state, or None where it finds none.

    DeepSpeed brings back the settings of the optimizer too; those of this run count, where they were changed.
    """
    path, state = engine.load_checkpoint(folder, tag=STATE_TAG, load_module_strict=strict)
    if path is None:
        return None
    schedule, now = engine.lr_scheduler, lr
    if schedule is not None:
        schedule.base_lrs = [lr] * len(schedule.base_lrs)
        now = lr * schedule.lr_lambdas[0](schedule.last_epoch)
    for group in engine.optimizer.param_groups:
        group.update(lr=now, initial_lr=lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
    return state


def take_step(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
    """Apply the accumulated gradient: the lr it was applied with, and its norm; stage 0 clips by that and does not tell it."""
    lr = float(engine.get_lr()[0])
    engine.set_gradient_accumulation_boundary(True)
    engine.step()
    norm = engine.get_global_grad_norm()
    return {"lr": lr} if norm is None else {"lr": lr, "grad_norm": float(norm)}


def join_process_group() -> None:
    """Join the process group of the launcher, of an embedded vLLM, or make one of a single rank when there is neither."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # compiles for a minute and is no faster than gloo here
        )
    if "RANK" not in os.environ:
        port = str(ranks.free_port("127.0.0.1"))
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    # DeepSpeed 0.19.8 remembers the groups of an earlier engine, also after an embedded vLLM has destroyed them.
    deepspeed.utils.groups._release_process_group_references()
