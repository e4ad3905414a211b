"""What every function of per-token tensors demands of them, and the one rule for which tokens can be used.

B sequences, L padded length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# A log-probability is at most 0; a float32 softmax may round past it by less than this. Some rollouts carry +1.0 for "not known"
# (open-instruct #1817).
ABOVE_ZERO = 1e-3


def require_aligned(what: str, *, mask: Tensor | None = None, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor given is [B, L] of one shape, on this process alone, and `mask` is bool.

    what: the caller's name, for the message; None among the tensors stands for one that was not given. Reads metadata only.
    """
    named = {name: tensor for name, tensor in ({"mask": mask} | tensors).items() if tensor is not None}
    first = next(iter(named.values()))
    for name, tensor in named.items():
        _require_local(what, name, tensor)
        if tensor.ndim != 2 or tensor.shape != first.shape:
            shapes = ", ".join(f"{other} {tuple(x.shape)}" for other, x in named.items())
            raise ValueError(f"{what}: every tensor must be [B, L] of one shape, got {shapes}")
    if mask is not None:
        require_mask(what, mask)


def require_mask(what: str, mask: Tensor) -> None:
    """Raise ValueError for a mask that is not bool: where it indexes, a mask of integers picks rows 0 and 1."""
    if mask.dtype != torch.bool:
        raise ValueError(f"{what}: the mask must be bool, got {mask.dtype}; use mask.bool() if it holds 0 and 1")


def _require_local(what: str, name: str, tensor: Tensor) -> None:
    if type(tensor) is torch.Tensor or not torch.distributed.is_available():
        return
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        raise ValueError(
            f"{what}: {name} is a DTensor, spread over ranks; pass .full_tensor(), or .to_local() on each rank and merge what "
            "comes out (mismatch.reduce)"
        )


def constant(x: Tensor) -> Tensor:
    """x without its gradient, in float32 at least: what a loss divides by or compares with is data."""
    return wide(x.detach())


def wide(x: Tensor) -> Tensor:
    """x in float32 at least. In bfloat16 the clip bounds 1.0003 and 0.9997 do not exist, and 0.1875 is clipped at 0.2."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def usable(old_BL: Tensor, rollout_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """[B, L] bool: masked tokens whose log-probabilities are finite on both sides and were sampled with one of at most 0."""
    return mask_BL & old_BL.isfinite() & sampled(rollout_BL)


def require_usable(what: str, old_BL: Tensor, rollout_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """`usable` of what `require_aligned` lets pass, without a gradient. what: the caller's name, for the message."""
    require_aligned(what, old=old_BL, rollout=rollout_BL, mask=mask_BL)
    return usable(old_BL.detach(), rollout_BL.detach(), mask_BL)


def sampled(rollout_logprobs_BL: Tensor) -> Tensor:
    """[B, L] bool: finite and, to rounding, at most 0, as the log-probability of a sampled token is."""
    return rollout_logprobs_BL.isfinite() & (rollout_logprobs_BL <= ABOVE_ZERO)
