"""write_tokens(): a step's tokens from any loop, in the file that `rlalign mismatch` and the report read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlalign.tracking import token_files
from rlalign.types import UNKNOWN_VERSION

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
) -> Path:
    """Write directory/tokens/step-NNNNNN.parquet, one row per token under the mask, and return its path.

    [B, L] tensors are aligned: entry t is about token t; completions alone are as good as whole sequences. Logprobs in nats.
    policy_version: that sampled, one number, [B] or [B, L]; trainer_version: that recomputed (their difference is the lag; -1 and 0
    where nobody says). advantage: [B] or [B, L]. text_of: token ids to words, such as a tokenizer's convert_ids_to_tokens.
    `rlalign mismatch DIRECTORY/tokens` reads it. Raises ValueError for shapes that differ.
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
    folder = Path(directory) / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    return token_files.write_tokens(folder / f"step-{step:06d}.parquet", step, columns)
