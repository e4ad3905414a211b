"""The sums over the vocabulary behind token_logprobs, tile by tile: [tokens, vocabulary] never exists.

A tile is `tile.tokens` rows by `tile.vocab` columns of float32 logits; vocabulary outer, tokens inner, one running sum
per token. The backward pass (backward.py) forms the same tiles again.

N tokens, E ids of all their kept sets, D hidden, V vocabulary (or this rank's shard of it), T rows and S columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlalign.head import triton as gpu_head
from rlalign.head.products import Route, logits_of, stored_for
from rlalign.logprobs.blocks import Stash, Tile, columns_of, padded, strip_height, strips, token_tiles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlalign.head.triton import launches

# What a token outside the kept set adds to its logit: probability exactly 0, as with -inf, but 0 * BARRED is not NaN.
BARRED = -1e30


@dataclass(frozen=True, slots=True)
class Kept:
    """The ids a softmax runs over, token by token and ragged: memory is that of the sets, not of the widest of them.

    ids_E int32, on the device of the logits, counted from the first row of the weight; start_M int64 [N + 1] on CPU.
    Token n's ids are ids_E[start_M[n] : start_M[n + 1]]; ids outside the weight belong to another shard.
    """

    ids_E: Tensor
    start_M: Tensor

    @staticmethod
    def of(ids_E: Tensor, count_N: Tensor, device: torch.device) -> Kept:
        """From sets one behind the other and their sizes."""
        return Kept(ids_E.to(device), torch.nn.functional.pad(count_N.cpu().cumsum(0), (1, 0)))

    def shifted(self, first: int) -> Kept:
        """The same, counted from id `first`."""
        return Kept(self.ids_E - first, self.start_M)

    def tokens(self, index_N: Tensor) -> Kept:
        """The sets of some tokens, in that order."""
        index_N = index_N.cpu()
        start_N, count_N = self.start_M[:-1][index_N], self.start_M.diff()[index_N]
        before_N = count_N.cumsum(0) - count_N
        entry_E = torch.arange(int(count_N.sum())) + (start_N - before_N).repeat_interleave(count_N)
        return Kept.of(self.ids_E[entry_E.to(self.ids_E.device)], count_N, self.ids_E.device)

    def cells(self, rows: slice, columns: slice) -> Tensor:
        """Where the sets of these tokens lie in a tile [T, S] laid out flat; T * S for ids outside the columns."""
        bounds = self.start_M[rows.start : rows.stop + 1]
        device, height, width = self.ids_E.device, rows.stop - rows.start, columns.stop - columns.start
        first, last = int(bounds[0]), int(bounds[-1])
        row_T = torch.arange(height, device=device)
        row_E = row_T.repeat_interleave(bounds.diff().to(device), output_size=last - first)
        column_E = self.ids_E[first:last].long() - columns.start
        inside_E = (column_E >= 0) & (column_E < width)
        return torch.where(inside_E, row_E * width + column_E, height * width)

    def bar_(self, x_TS: Tensor, rows: slice, columns: slice) -> Tensor:
        """BARRED added to every logit outside its token's set, in place."""
        barred = torch.full((x_TS.numel() + 1,), BARRED, device=x_TS.device)
        barred[self.cells(rows, columns)] = 0.0
        return x_TS.add_(barred[:-1].view(x_TS.shape))

    def mask(self, rows: slice, columns: slice) -> Tensor:
        """[T, S] bool: which of these columns are in the sets of these tokens."""
        width = columns.stop - columns.start
        flat = torch.zeros((rows.stop - rows.start) * width + 1, dtype=torch.bool, device=self.ids_E.device)
        flat[self.cells(rows, columns)] = True
        return flat[:-1].view(-1, width)


# Hidden states of up to this many numbers are widened once, larger ones tile by tile.
_WIDENED_ONCE = 2**24


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

    def slope(self, x_TS: Tensor, rows: slice) -> Tensor | None:
        """d(transformed) / d(projection) given the transformed logits; None when it is 1."""
        if self.soft_cap is None and self.logit_scale == 1.0 and self.temperature_N is None:
            return None
        scale_T1 = torch.full((1, 1), self.logit_scale, device=x_TS.device)
        if self.temperature_N is not None:
            scale_T1 = scale_T1 / self.temperature_N[rows].unsqueeze(1)
        if self.soft_cap is None:
            return scale_T1
        tanh_TS = x_TS.div(scale_T1 * self.soft_cap).clamp_(-1.0, 1.0)
        return tanh_TS.square_().neg_().add_(1.0).mul_(scale_T1)


class Sums(NamedTuple):
    """Per token, over the given columns: log-sum-exp, logit of the target (NaN: not among them), mean logit under p."""

    lse_N: Tensor
    target_N: Tensor
    mean_N: Tensor | None


@dataclass(frozen=True, slots=True)
class Problem:
    """Operands of one call. target_N counts from this weight's first row; ids outside belong to another shard.

    kept: counted likewise, the ids the softmax runs over; None means all.
    """

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    target_N: Tensor
    transform: Transform
    tile: Tile
    route: Route
    kept: Kept | None = None

    def widened(self, storage: Route) -> Problem:
        """The same with hidden states in that route's storage, where a whole copy of them is small."""
        whole = self.hidden_ND.numel() <= _WIDENED_ONCE
        return replace(self, hidden_ND=stored_for(self.hidden_ND, storage)) if whole else self

    def blocks(self, storage: Route | None = None) -> Iterator[tuple[slice, Tensor]]:
        """(columns, their weight in that route's storage, until the next block); no block is a single column.

        storage: by default that of the problem's own route.
        """
        blocks = columns_of(self.weight_VD.shape[0], self.tile.vocab)
        copies = stored_for(self.weight_VD[:0], storage or self.route).dtype != self.weight_VD.dtype
        shape = (self.tile.vocab, self.weight_VD.shape[1])
        buffer = padded(*shape, torch.float32, self.weight_VD.device) if copies else None
        for columns in blocks:
            weight_SD = self.weight_VD[columns]
            yield columns, weight_SD if buffer is None else buffer[: len(weight_SD)].copy_(weight_SD)

    @property
    def one_pass(self) -> bool:
        """Whether kernels of rlalign/head/triton sum a tile and differentiate it, each in one pass over its products."""
        return gpu_head.sums_on(self.hidden_ND.device)

    def products(self, rows: slice, weight_SD: Tensor, out_TS: Tensor) -> Tensor:
        """Logits of a tile before bias and transform, written into `out_TS`."""
        return logits_of(stored_for(self.hidden_ND[rows], self.route), weight_SD, self.route, out=out_TS)

    def logits(self, rows: slice, columns: slice, weight_SD: Tensor, out_TS: Tensor) -> Tensor:
        """Transformed logits of a tile, written into `out_TS`."""
        return self.finish_(self.products(rows, weight_SD, out_TS), rows, columns)

    def finish_(self, x_TS: Tensor, rows: slice, columns: slice) -> Tensor:
        """Transformed logits from the products of a tile, in place."""
        if self.bias_V is not None:
            x_TS.add_(self.bias_V[columns].float())
        self.transform.apply_(x_TS, rows)
        return x_TS if self.kept is None else self.kept.bar_(x_TS, rows, columns)

    def softmax(self, rows: slice, columns: slice) -> launches.Softmax:
        """What the kernels need to know of a tile beyond its products."""
        from rlalign.head.triton.launches import Softmax  # here, since it imports Triton

        heat_N, transform = self.transform.temperature_N, self.transform
        return Softmax(
            bias_V=None if self.bias_V is None else self.bias_V[columns].contiguous(),
            temperature_N=None if heat_N is None else heat_N[rows].contiguous(),
            target_N=self.target_N[rows].contiguous(),
            first_id=columns.start,
            soft_cap=transform.soft_cap,
            logit_scale=transform.logit_scale,
            allowed_NV=None if self.kept is None else self.kept.mask(rows, columns),
        )

    def target_columns(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """([T, 1] column of each target inside these columns, [T] whether it is one of them; others are clamped)."""
        column_T = self.target_N[rows] - columns.start
        width = columns.stop - columns.start
        return column_T.clamp(0, width - 1).unsqueeze(1), (column_T >= 0) & (column_T < width)


def forward_sums(problem: Problem, *, mean: bool, stash: Stash | None = None) -> Sums:
    """Log-sum-exp, target logit and (for the entropy) mean logit of every token, over this weight's rows.

    On CPU exp is summed without subtracting a maximum, which saves two passes; tokens whose sum leaves the range of
    float32 are summed again with a running maximum (arXiv 1805.02867). Elsewhere the running maximum is always taken,
    since looking at the sums would synchronise the device. The tiles that `stash` has room for are left in it.
    """
    if problem.one_pass:
        return _one_pass_sums(problem, mean=mean, stash=stash)
    if problem.hidden_ND.device.type != "cpu":
        return _sums(problem, mean=mean, running_max=True, stash=stash)
    sums = _sums(problem, mean=mean, running_max=False, stash=stash)
    kept = (sums.lse_N > -60.0) & (sums.lse_N < 80.0)
    if sums.mean_N is not None:
        kept &= sums.mean_N.isfinite()
    again = kept.logical_not_().nonzero().squeeze(1)
    if len(again):
        temperature_N = problem.transform.temperature_N
        transform = replace(problem.transform, temperature_N=None if temperature_N is None else temperature_N[again])
        hidden_ND, target_N = problem.hidden_ND[again], problem.target_N[again]
        kept = None if problem.kept is None else problem.kept.tokens(again)
        rows = replace(problem, hidden_ND=hidden_ND, target_N=target_N, kept=kept, transform=transform)
        for whole, part in zip(sums, _sums(rows, mean=mean, running_max=True), strict=True):
            if whole is not None and part is not None:
                whole[again] = part
    return sums


def _one_pass_sums(problem: Problem, *, mean: bool, stash: Stash | None) -> Sums:
    """`forward_sums` by kernels. Its bits depend neither on the number of rows nor on the stash."""
    from rlalign.head.triton import launches  # here, since it imports Triton

    problem, tile = problem.widened(problem.route), problem.tile
    n, vocab, device = len(problem.hidden_ND), len(problem.weight_VD), problem.hidden_ND.device
    tiles = [launches.tiles_of(columns.stop - columns.start) for columns in columns_of(vocab, tile.vocab)]
    sums_3TN = torch.empty(3, sum(tiles), n, device=device)
    target_N = torch.full((n,), float("nan"), device=device)
    buffer = None
    if problem.route is not Route.TRITON:
        buffer = padded(min(tile.tokens, n), min(tile.vocab, vocab), torch.float32, device)
    for of_block_3TN, (columns, weight_SD) in zip(sums_3TN.split(tiles, 1), problem.blocks(), strict=True):
        for rows in token_tiles(n, tile.tokens):
            kept_TS = None if stash is None else stash.tile(rows, columns)
            made_TS = None
            if buffer is not None:
                room_TS = buffer[: rows.stop - rows.start, : len(weight_SD)] if kept_TS is None else kept_TS
                made_TS, kept_TS = problem.products(rows, weight_SD, room_TS), None
            launches.softmax_sums(
                problem.hidden_ND[rows], weight_SD, made_TS, problem.softmax(rows, columns),
                of_block_3TN[:, :, rows], target_N[rows], mean=mean, kept_NV=kept_TS,
            )  # fmt: skip
    lse_N, mean_N = launches.merged(sums_3TN, mean=mean)
    return Sums(lse_N, target_N, mean_N)


def _sums(problem: Problem, *, mean: bool, running_max: bool, stash: Stash | None = None) -> Sums:
    problem, tile = problem.widened(problem.route), problem.tile
    n, device = problem.hidden_ND.shape[0], problem.hidden_ND.device
    target_N = torch.full((n,), float("nan"), device=device)
    buffer = padded(min(tile.tokens, n), min(tile.vocab, problem.weight_VD.shape[0]), torch.float32, device)
    sums = _Running(n, buffer.shape[1], device, mean=mean, running_max=running_max)
    for columns, weight_SD in problem.blocks():
        for rows in token_tiles(n, tile.tokens):
            room_TS = None if stash is None else stash.tile(rows, columns)
            out_TS = buffer[: rows.stop - rows.start, : len(weight_SD)] if room_TS is None else room_TS
            x_TS = problem.logits(rows, columns, weight_SD, out_TS)
            column_T1, inside_T = problem.target_columns(rows, columns)
            target_N[rows] = torch.where(inside_T, x_TS.gather(1, column_T1).squeeze(1), target_N[rows])
            for tokens, strip in strips(rows, device):
                sums.add(tokens, x_TS[strip], first=columns.start == 0)
    total_N, weighted_N, peak_N = sums.total_N, sums.weighted_N, sums.peak_N
    return Sums(total_N.log() + peak_N, target_N, weighted_N / total_N + peak_N if mean else None)


class _Running:
    """Per token, over the columns so far: the largest logit (or 0), sums of exp(x - peak) and of (x - peak) times that."""

    def __init__(self, n: int, width: int, device: torch.device, *, mean: bool, running_max: bool) -> None:
        self.peak_N, self.total_N, self.weighted_N = torch.zeros(3, n, device=device)
        self._mean, self._running_max = mean, running_max
        size = strip_height(device) * width  # scratch: fresh memory would be touched page by page in every strip
        self._exp = torch.empty(size, device=device)
        self._shifted = torch.empty(size, device=device) if running_max and mean else self._exp

    def add(self, tokens: slice, x_TS: Tensor, *, first: bool) -> None:
        """The next columns of these tokens; reads the logits and leaves them as they are."""
        exp_TS, shifted_TS = (scratch[: x_TS.numel()].view(x_TS.shape) for scratch in (self._exp, self._shifted))
        if self._running_max:
            self._raise_peak(tokens, x_TS.amax(1), first=first)
            x_TS = torch.sub(x_TS, self.peak_N[tokens].unsqueeze(1), out=shifted_TS)
        torch.exp(x_TS, out=exp_TS)
        self.total_N[tokens].add_(exp_TS.sum(1))
        if self._mean:
            self.weighted_N[tokens].add_(exp_TS.mul_(x_TS).sum(1))

    def _raise_peak(self, tokens: slice, highest_T: Tensor, *, first: bool) -> None:
        if first:
            self.peak_N[tokens] = highest_T
            return
        before_T = self.peak_N[tokens].clone()
        self.peak_N[tokens] = torch.maximum(before_T, highest_T)
        lower_T = before_T - self.peak_N[tokens]
        self.weighted_N[tokens] = (self.weighted_N[tokens] + lower_T * self.total_N[tokens]) * lower_T.exp()
        self.total_N[tokens] *= lower_T.exp()


def mirror(
    problem: Problem, *, rows: int | None, entropy: bool, stash: Stash | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob_N, entropy_N or empty, lse_N) through torch.log_softmax over whole rows, with the bits of vLLM's.

    `rows` of the vocabulary are held at once; by default as many logits as four tiles. The logits that `stash` has room
    for are left in it.
    """
    n, vocab = problem.hidden_ND.shape[0], problem.weight_VD.shape[0]
    device, columns = problem.hidden_ND.device, slice(0, vocab)
    rows = rows or max(2, 4 * problem.tile.tokens * problem.tile.vocab // vocab)
    logprob_N, lse_N, entropy_N = (torch.empty(size, device=device) for size in (n, n, n if entropy else 0))
    weight_VD = stored_for(problem.weight_VD, problem.route)
    buffer = torch.empty(min(rows, n), vocab, device=device)
    for tile in token_tiles(n, rows):
        x_TV = problem.products(tile, weight_VD, buffer[: tile.stop - tile.start])
        if stash is not None and problem.one_pass:
            stash.put(tile, x_TV)  # whose backward pass transforms them itself
        problem.finish_(x_TV, tile, columns)
        if stash is not None and not problem.one_pass:
            stash.put(tile, x_TV)
        column_T1, inside_T = problem.target_columns(tile, columns)
        logit_T = x_TV.gather(1, column_T1).squeeze(1)
        torch.log_softmax(x_TV, dim=-1, out=x_TV)
        logprob_N[tile] = x_TV.gather(1, column_T1).squeeze(1).masked_fill_(~inside_T, float("nan"))
        lse_N[tile] = logit_T - logprob_N[tile]
        if entropy:
            entropy_N[tile] = -x_TV.mul_(x_TV.exp()).sum(1)
    return logprob_N, entropy_N, lse_N
