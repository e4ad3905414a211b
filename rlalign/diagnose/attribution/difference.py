"""How far two recordings of one point are apart, token by token.

Suffixes: N tokens, D features.
Of one token: absolute = root mean square of the difference over its features; relative = |a - b| / max(|a|, |b|), Euclidean;
cosine of the angle between a and b. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign.diagnose.attribution.mapping import LOGITS
from rlalign.rollout.engine.teacher_forcing import Route
from rlalign.rollout.worker.recording import POSITION, SEQUENCE, Recording
from rlalign.types import RolloutBatch

ELEMENTS = 2**22  # compared at once


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one number per token."""

    mean: float
    p99: float
    max: float

    @classmethod
    def of(cls, values_N: Tensor) -> Spread:
        """Raises ValueError for no tokens."""
        if not len(values_N):
            raise ValueError("no tokens to summarise")
        return cls(float(values_N.mean()), float(torch.quantile(values_N.double(), 0.99)), float(values_N.max()))


@dataclass(frozen=True, slots=True)
class TokenDifferences:
    """One point, one row per token. rows_N3: (sequence, position, decoded)."""

    rows_N3: Tensor
    absolute_N: Tensor
    relative_N: Tensor
    cosine_N: Tensor


def differences(
    one: Recording, other: Recording, point: str, rows: tuple[Tensor, Tensor], *, width: int
) -> TokenDifferences:
    """These rows of both recordings, compared pair by pair. width: features of the whole point."""
    step = max(1, ELEMENTS // width)
    found = [
        _compare(one.read(point, mine, width=width), other.read(point, theirs, width=width))
        for mine, theirs in zip(rows[0].split(step), rows[1].split(step), strict=True)
    ]
    stacked = torch.cat(found, dim=1) if found else torch.zeros(3, 0, dtype=torch.float64)
    return TokenDifferences(one.table(point)[rows[0]], *stacked)


def common_rows(one_N3: Tensor, other_N3: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers in both tables of the tokens that are in both."""
    places = {(s, p): i for i, (s, p) in enumerate(other_N3[:, [SEQUENCE, POSITION]].tolist())}
    pairs = [
        (i, places[(s, p)]) for i, (s, p) in enumerate(one_N3[:, [SEQUENCE, POSITION]].tolist()) if (s, p) in places
    ]
    both = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _compare(one_ND: Tensor, other_ND: Tensor) -> Tensor:
    """[3, N]: absolute, relative, cosine."""
    one_ND, other_ND = one_ND.double(), other_ND.double()
    apart_N = (one_ND - other_ND).norm(dim=1)
    norm_N, other_norm_N = one_ND.norm(dim=1), other_ND.norm(dim=1)
    largest_N, product_N = torch.maximum(norm_N, other_norm_N), norm_N * other_norm_N
    relative_N = torch.where(largest_N > 0, apart_N / largest_N, torch.zeros_like(apart_N))  # both zero: equal
    cosine_N = torch.where(product_N > 0, (one_ND * other_ND).sum(1) / product_N, (largest_N == 0).double())
    return torch.stack([apart_N / one_ND.shape[1] ** 0.5, relative_N, cosine_N])


def scalar_differences(one_N: Tensor, other_N: Tensor, rows_N3: Tensor) -> TokenDifferences:
    """The same for one number per token, such as its logprob: the cosine then only tells the signs."""
    return TokenDifferences(rows_N3, *_compare(one_N[:, None], other_N[:, None]))


def compared(
    one: Recording, other: Recording, point: str, batch: RolloutBatch, width: int, route: Route = Route.prefill
) -> TokenDifferences:
    """The differences at the tokens that count."""
    return differences(one, other, point, counted(one, other, point, batch, route), width=width)


def counted(
    one: Recording, other: Recording, point: str, batch: RolloutBatch, route: Route = Route.prefill
) -> tuple[Tensor, Tensor]:
    """Row numbers in both recordings of the tokens that precede a scored token; for logits, that directly precede one.

    On the decode route only tokens that `one` decoded count; the logits behind the prompt are sampled from too.
    """
    rows_N, other_rows_N = common_rows(one.table(point), other.table(point))
    sequence_N, position_N, decoded_N = one.table(point)[rows_N].unbind(1)
    if point == LOGITS:
        predicts_BL = torch.nn.functional.pad(batch.loss_mask_BL[:, 1:], (0, 1))
        keep_N = predicts_BL[sequence_N, position_N]
    else:
        last_B = torch.where(batch.loss_mask_BL, torch.arange(batch.token_ids_BL.shape[1]), 0).amax(1)
        keep_N = (position_N < last_B[sequence_N]) & ((decoded_N == 1) | (route is Route.prefill))
    return rows_N[keep_N], other_rows_N[keep_N]


def scored(one_BL: Tensor, other_BL: Tensor, batch: RolloutBatch) -> TokenDifferences:
    """Logprobs of the scored tokens, at the position that predicts them."""
    sequence_N, position_N = batch.loss_mask_BL.nonzero(as_tuple=True)
    rows_N3 = torch.stack([sequence_N, position_N - 1, torch.zeros_like(position_N)], dim=1)
    return scalar_differences(one_BL[batch.loss_mask_BL], other_BL[batch.loss_mask_BL], rows_N3)


def distinct(one: Recording, point: str, rows: tuple[Tensor, Tensor], batch: RolloutBatch) -> tuple[Tensor, Tensor]:
    """The first row of every context: samples of one prompt share its tokens, and so their activations."""
    seen: set[tuple[int, ...]] = set()
    keep = []
    for i, (sequence, position, _) in enumerate(one.table(point)[rows[0]].tolist()):
        context = tuple(batch.token_ids_BL[sequence, : position + 1].tolist())
        if context not in seen:
            seen.add(context)
            keep.append(i)
    return rows[0][keep], rows[1][keep]
