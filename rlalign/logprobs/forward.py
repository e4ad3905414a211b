"""The sums over the vocabulary behind token_logprobs, tile by tile: [tokens, vocabulary] never exists.

A tile is `tile.tokens` rows by `tile.vocab` columns of float32 logits; vocabulary outer, tokens inner, one running sum
per token. The backward pass (backward.py) forms the same tiles again.

N tokens, D hidden, V vocabulary (or this rank's shard of it), T rows and S columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlalign.products import Route, logits_of, stored_for

if TYPE_CHECKING:
    from collections.abc import Iterator

# Rows a multiple of 4096 bytes apart collide in the caches: without the padding the products take a third longer (AMX).
_PAD = 32
# What a token outside the kept set adds to its logit: probability exactly 0, as with -inf, but 0 * BARRED is not NaN.
BARRED = -1e30


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of logits held at once."""

    tokens: int
    vocab: int

    @staticmethod
    def of(device: torch.device, chunk: int | None) -> Tile:
        """16 MiB of logits on CPU, 256 MiB elsewhere; `chunk` overrides the number of tokens."""
        tokens, vocab = (2048, 2048) if device.type == "cpu" else (4096, 16384)
        return Tile(chunk or tokens, vocab)


@dataclass(frozen=True, slots=True)
class Transform:
    """From the projection to the logits the softmax sees, in vLLM's order: soft cap, scale, division by temperature.

    temperature_N: float32 per token, or None for 1. Gemma-2 soft cap: arXiv 2408.00118.
    """

    soft_cap: float | None = None
    logit_scale: float = 1.0
    temperature_N: Tensor | None = None

    def apply_(self, x_TS: Tensor, rows: slice) -> Tensor:
        """In place, with the operations and the order of vLLM's LogitsProcessor and sampler, so with their bits."""
        if self.soft_cap is not None:
            x_TS.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        if self.logit_scale != 1.0:
            x_TS.mul_(self.logit_scale)
        if self.temperature_N is not None:
            x_TS.div_(self.temperature_N[rows].unsqueeze(1))
        return x_TS

    def slope_(self, x_TS: Tensor, rows: slice) -> Tensor | None:
        """d(transformed) / d(projection) given the transformed logits, which it overwrites; None when it is 1."""
        if self.soft_cap is None and self.logit_scale == 1.0 and self.temperature_N is None:
            return None
        scale_T1 = torch.full((1, 1), self.logit_scale, device=x_TS.device)
        if self.temperature_N is not None:
            scale_T1 = scale_T1 / self.temperature_N[rows].unsqueeze(1)
        if self.soft_cap is None:
            return scale_T1
        tanh_TS = x_TS.div_(scale_T1 * self.soft_cap).clamp_(-1.0, 1.0)
        return tanh_TS.square_().neg_().add_(1.0).mul_(scale_T1)


class Sums(NamedTuple):
    """Per token, over the given columns: log-sum-exp, logit of the target (NaN: not among them), mean logit under p."""

    lse_N: Tensor
    target_N: Tensor
    mean_N: Tensor | None


@dataclass(frozen=True, slots=True)
class Problem:
    """Operands of one call. target_N counts from this weight's first row; ids outside belong to another shard.

    kept_NK: counted likewise, the ids the softmax runs over, others filled up with negative numbers; None means all.
    """

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    target_N: Tensor
    transform: Transform
    tile: Tile
    route: Route
    kept_NK: Tensor | None = None

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns, their weight in the route's storage); no block is a single column."""
        vocab = self.weight_VD.shape[0]
        count = -(-vocab // self.tile.vocab)
        bounds = [vocab * i // count for i in range(count + 1)] if count else []
        for start, stop in pairwise(bounds):
            yield slice(start, stop), stored_for(self.weight_VD[start:stop], self.route)

    def logits(self, rows: slice, columns: slice, weight_SD: Tensor, out_TS: Tensor) -> Tensor:
        """Transformed logits of a tile, written into `out_TS`."""
        x_TS = logits_of(stored_for(self.hidden_ND[rows], self.route), weight_SD, self.route, out=out_TS)
        if self.bias_V is not None:
            x_TS.add_(self.bias_V[columns].float())
        self.transform.apply_(x_TS, rows)
        if self.kept_NK is not None:
            width = columns.stop - columns.start
            column_TK = self.kept_NK[rows] - columns.start
            column_TK = torch.where((column_TK >= 0) & (column_TK < width), column_TK, width)
            barred = torch.full((len(x_TS), width + 1), BARRED, device=x_TS.device)
            x_TS.add_(barred.scatter_(1, column_TK, 0.0)[:, :width])
        return x_TS

    def target_columns(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """([T, 1] column of each target inside these columns, [T] whether it is one of them; others are clamped)."""
        column_T = self.target_N[rows] - columns.start
        width = columns.stop - columns.start
        return column_T.clamp(0, width - 1).unsqueeze(1), (column_T >= 0) & (column_T < width)


def padded(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [rows, columns] whose rows do not start a power of two apart."""
    return torch.empty(rows, columns + _PAD, dtype=dtype, device=device)[:, :columns]


def forward_sums(problem: Problem, *, mean: bool) -> Sums:
    """Log-sum-exp, target logit and (for the entropy) mean logit of every token, over this weight's rows.

    On CPU exp is summed without subtracting a maximum, which saves two passes; tokens whose sum leaves the range of
    float32 are summed again with a running maximum (arXiv 1805.02867). Elsewhere the running maximum is always taken,
    since looking at the sums would synchronise the device.
    """
    if problem.hidden_ND.device.type != "cpu":
        return _sums(problem, mean=mean, running_max=True)
    sums = _sums(problem, mean=mean, running_max=False)
    kept = (sums.lse_N > -60.0) & (sums.lse_N < 80.0)
    if sums.mean_N is not None:
        kept &= sums.mean_N.isfinite()
    again = kept.logical_not_().nonzero().squeeze(1)
    if len(again):
        temperature_N = problem.transform.temperature_N
        transform = replace(problem.transform, temperature_N=None if temperature_N is None else temperature_N[again])
        hidden_ND, target_N = problem.hidden_ND[again], problem.target_N[again]
        kept_NK = None if problem.kept_NK is None else problem.kept_NK[again]
        rows = replace(problem, hidden_ND=hidden_ND, target_N=target_N, kept_NK=kept_NK, transform=transform)
        for whole, part in zip(sums, _sums(rows, mean=mean, running_max=True), strict=True):
            if whole is not None:
                whole[again] = part
    return sums


def _sums(problem: Problem, *, mean: bool, running_max: bool) -> Sums:
    hidden_ND, tile = problem.hidden_ND, problem.tile
    n, device = hidden_ND.shape[0], hidden_ND.device
    peak_N, total_N, weighted_N = torch.zeros(3, n, device=device)
    target_N = torch.full((n,), float("nan"), device=device)
    shape = (min(tile.tokens, n), min(tile.vocab, problem.weight_VD.shape[0]))
    x_buffer = padded(*shape, torch.float32, device)
    exp_buffer = padded(*shape, torch.float32, device) if mean else x_buffer
    for columns, weight_SD in problem.blocks():
        width = columns.stop - columns.start
        for rows in token_tiles(n, tile.tokens):
            height = rows.stop - rows.start
            x_TS = problem.logits(rows, columns, weight_SD, x_buffer[:height, :width])
            column_T1, inside_T = problem.target_columns(rows, columns)
            target_N[rows] = torch.where(inside_T, x_TS.gather(1, column_T1).squeeze(1), target_N[rows])
            if running_max and columns.start == 0:
                peak_N[rows] = x_TS.amax(1)
            elif running_max:
                before_T = peak_N[rows].clone()
                peak_N[rows] = torch.maximum(before_T, x_TS.amax(1))
                lower_T = before_T - peak_N[rows]
                weighted_N[rows] = (weighted_N[rows] + lower_T * total_N[rows]) * lower_T.exp()
                total_N[rows] *= lower_T.exp()
            if running_max:
                x_TS.sub_(peak_N[rows].unsqueeze(1))
            exp_TS = torch.exp(x_TS, out=exp_buffer[:height, :width])
            total_N[rows] += exp_TS.sum(1)
            if mean:
                weighted_N[rows] += x_TS.mul_(exp_TS).sum(1)
    return Sums(total_N.log() + peak_N, target_N, weighted_N / total_N + peak_N if mean else None)


def mirror(problem: Problem, *, rows: int | None, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob_N, entropy_N or empty, lse_N) through torch.log_softmax over whole rows, with the bits of vLLM's.

    `rows` of the vocabulary are held at once; by default as many logits as four tiles.
    """
    n, vocab = problem.hidden_ND.shape[0], problem.weight_VD.shape[0]
    device, columns = problem.hidden_ND.device, slice(0, vocab)
    rows = rows or max(2, 4 * problem.tile.tokens * problem.tile.vocab // vocab)
    logprob_N, lse_N, entropy_N = (torch.empty(size, device=device) for size in (n, n, n if entropy else 0))
    weight_VD = stored_for(problem.weight_VD, problem.route)
    buffer = torch.empty(min(rows, n), vocab, device=device)
    for tile in token_tiles(n, rows):
        x_TV = problem.logits(tile, columns, weight_VD, buffer[: tile.stop - tile.start])
        column_T1, inside_T = problem.target_columns(tile, columns)
        logit_T = x_TV.gather(1, column_T1).squeeze(1)
        torch.log_softmax(x_TV, dim=-1, out=x_TV)
        logprob_N[tile] = x_TV.gather(1, column_T1).squeeze(1).masked_fill_(~inside_T, float("nan"))
        lse_N[tile] = logit_T - logprob_N[tile]
        if entropy:
            entropy_N[tile] = -x_TV.mul_(x_TV.exp()).sum(1)
    return logprob_N, entropy_N, lse_N


def token_tiles(n: int, height: int) -> list[slice]:
    """The rows 0..n in slices of `height`."""
    return [slice(start, min(start + height, n)) for start in range(0, n, height)]
