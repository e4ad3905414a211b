"""The ids a softmax runs over, token by token and ragged: memory is that of the sets, not of the widest of them.

N tokens, E ids of all their sets, T rows and S columns of a tile, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What a token outside the kept set adds to its logit: probability exactly 0, as with -inf, but 0 * BARRED is not NaN.
BARRED = -1e30


@dataclass(frozen=True, slots=True)
class Kept:
    """ids_E int32, on the device of the logits, counted from the first row of the weight; start_M int64 [N + 1] on CPU.

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

    def mask(self, rows: slice, vocab: int) -> Tensor:
        """[T, V] bool of the sets of these tokens."""
        flat = torch.zeros((rows.stop - rows.start) * vocab + 1, dtype=torch.bool, device=self.ids_E.device)
        flat[self.cells(rows, slice(0, vocab))] = True
        return flat[:-1].view(-1, vocab)
