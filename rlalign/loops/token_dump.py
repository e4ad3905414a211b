"""write_tokens(): a step's tokens from any loop, in the files that `rlalign mismatch`, the report and `attribute --run` read.

Suffixes: B sequences, L padded length, N tokens under the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign import ranks
from rlalign.loops.step_monitor import Monitor
from rlalign.tracking import token_files
from rlalign.types import UNKNOWN_VERSION, RolloutBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.types import LogprobSpec

__all__ = ["write_tokens"]


def write_tokens(
    directory: Path | str,
    step: int,
    *,
    token_ids_BL: Tensor,
    rollout_logprobs_BL: Tensor,
    old_logprobs_BL: Tensor,
    mask_BL: Tensor,
    policy_version: int | Tensor | None = None,
    trainer_version: int | None = None,
    entropy_BL: Tensor | None = None,
    group_B: Tensor | Sequence[int] | None = None,
    reward_B: Tensor | Sequence[float] | None = None,
    advantage: Tensor | None = None,
    text_of: Callable[[list[int]], Sequence[str]] = lambda ids: [str(i) for i in ids],
    attention_mask_BL: Tensor | None = None,
    monitor: Monitor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write directory/tokens/step-NNNNNN.parquet, one row per token under the mask, and return its path.

    [B, L] tensors are aligned: entry t is about token t; completions alone are as good as whole sequences. Logprobs in nats.
    policy_version: that sampled, one number, [B] or [B, L]; trainer_version: that recomputed (their difference is the lag; -1 and 0
    where nobody says). advantage: [B] or [B, L]. text_of: token ids to words, such as a tokenizer's convert_ids_to_tokens.
    monitor, tokenizer, attention_mask_BL: also keep whole sequences and the model's weights as they are now, rounded to the
    engine's dtype, in directory/replay (a copy of the model each call; every rank must call): for `rlalign attribute --run`.
    `rlalign mismatch DIRECTORY/tokens` reads it. Raises ValueError for shapes that differ, and for a part of the three.
    """
    shape = tuple(token_ids_BL.shape)
    for name, tensor in {
        "rollout_logprobs_BL": rollout_logprobs_BL,
        "old_logprobs_BL": old_logprobs_BL,
        "mask_BL": mask_BL,
    }.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"write_tokens: {name} is {tuple(tensor.shape)}, token_ids_BL {shape}; every entry is about one token"
            )
    mask_BL = mask_BL.cpu().bool()
    rows_N, positions_N = mask_BL.nonzero(as_tuple=True)
    count = len(rows_N)

    def at(value: Tensor | Sequence[float] | float | None, missing: float) -> list:
        """One number a token, from one, [B] or [B, L]."""
        if value is None or isinstance(value, int | float):
            return [missing if value is None else value] * count
        tensor = torch.as_tensor(value).detach().cpu()
        if tuple(tensor.shape) not in (shape, shape[:1]):
            raise ValueError(f"write_tokens: got {tuple(tensor.shape)} where {shape[:1]} or {shape} belongs")
        return (tensor[rows_N] if tensor.dim() == 1 else tensor[rows_N, positions_N]).tolist()

    versions = at(policy_version, UNKNOWN_VERSION)
    ids = at(token_ids_BL, 0)
    known = policy_version is not None and trainer_version is not None
    columns = {
        "sequence": rows_N.tolist(),
        "position": positions_N.tolist(),
        "token_id": ids,
        "token": list(text_of(ids)),
        "rollout_logprob": at(rollout_logprobs_BL.float(), 0.0),
        "old_logprob": at(old_logprobs_BL.float(), 0.0),
        "entropy": at(entropy_BL, float("nan")),
        "policy_version": versions,
        "lag": [trainer_version - v if known else 0 for v in versions],
        "kv_version": [UNKNOWN_VERSION] * count,
        "prompt_id": at(group_B, 0),
        "group_id": at(group_B, 0),
        "reward": at(reward_B, float("nan")),
        "advantage": at(advantage, float("nan")),
        "loss_mask": [True] * count,
    }
    if monitor is not None or tokenizer is not None or attention_mask_BL is not None:
        _require_whole(monitor, tokenizer, attention_mask_BL, shape)
        whole = (
            token_ids_BL,
            attention_mask_BL.bool(),
            mask_BL,
            rollout_logprobs_BL.float() * mask_BL.to(rollout_logprobs_BL.device),
        )
        batch = _batch(*(tensor.detach().cpu() for tensor in whole), torch.tensor(versions), group_B, monitor.spec)
        _keep_sides(Path(directory), step, batch, old_logprobs_BL.detach().float(), monitor, tokenizer)
    folder = Path(directory) / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    return token_files.write_tokens(folder / f"step-{step:06d}.parquet", step, columns)


def _require_whole(
    monitor: Monitor | None, tokenizer: object, attention_mask_BL: Tensor | None, shape: tuple[int, ...]
) -> None:
    given = {"monitor": monitor, "tokenizer": tokenizer, "attention_mask_BL": attention_mask_BL}
    if monitor is not None:
        given |= {f"the monitor's {name}": getattr(monitor, name) for name in ("engine", "mirror", "spec")}
    if missing := [name for name, value in given.items() if value is None]:
        raise ValueError(
            f"write_tokens: keeping a step whole needs monitor, tokenizer and attention_mask_BL, and a monitor with engine, mirror "
            f"and spec; missing: {', '.join(missing)}"
        )
    if tuple(attention_mask_BL.shape) != shape:
        raise ValueError(f"write_tokens: attention_mask_BL is {tuple(attention_mask_BL.shape)}, token_ids_BL {shape}")


def _batch(
    ids_BL: Tensor, attended_BL: Tensor, mask_BL: Tensor, rollout_BL: Tensor, versions_N: Tensor,
    group_B: Tensor | Sequence[int] | None, spec: LogprobSpec,
) -> RolloutBatch:  # fmt: skip
    groups_B = torch.as_tensor(range(len(ids_BL)) if group_B is None else group_B).cpu().long()
    unknown_BL = torch.full(ids_BL.shape, UNKNOWN_VERSION)
    versions_BL = unknown_BL.clone()
    versions_BL[mask_BL] = versions_N
    return RolloutBatch(
        token_ids_BL=ids_BL, attention_mask_BL=attended_BL, loss_mask_BL=mask_BL, rollout_logprobs_BL=rollout_BL,
        prompt_id_B=groups_B, group_id_B=groups_B.clone(), policy_version_BL=versions_BL, kv_version_BL=unknown_BL, spec=spec,
    )  # fmt: skip


def _keep_sides(
    directory: Path,
    step: int,
    batch: RolloutBatch,
    old_BL: Tensor,
    monitor: Monitor,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Weights that both sides can be loaded with, and the batch, as a run with tracking.replay_every keeps them."""
    from safetensors.torch import save_file

    body = monitor.engine.body_dtype

    def save(folder: Path) -> None:
        tensors = {n: t.to(body).cpu().contiguous().clone() for n, t in monitor.mirror.named_weights()}
        if ranks.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            monitor.mirror.inner.config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    token_files.save_weights(directory, step, save=save, master_VD=None)
    if ranks.rank() == 0:
        version = int(batch.policy_version_BL.max())
        token_files.save_batch(directory, step, batch, old_BL, version=version, trainer_ranks=ranks.world_size())
        sides = {"head_dtype": monitor.engine.head_dtype, "dtype": str(body).removeprefix("torch.")}
        token_files.write_loop(directory, sides)
