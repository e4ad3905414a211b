"""What a rollout did at each position, ragged: the ids it was sampled from, and the experts it went through.

Suffixes: B sequences, L padded length, E entries one behind the other, N positions, K experts of a token.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KeptSets", "Routes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSets:
    """The ids that each position of a batch was sampled from (top-p, top-k, min-p), ragged: 4 bytes an id.

    ids_E: int32 on CPU, the sets one behind the other, row by row. count_BL: [B, L] int64, ids of each position; 0 where no
    set is known or asked for.
    """

    ids_E: Tensor
    count_BL: Tensor

    def __post_init__(self) -> None:
        import torch

        total = int(self.count_BL.sum())
        if self.ids_E.dtype != torch.int32 or self.count_BL.dtype != torch.int64 or self.ids_E.shape != (total,):
            raise ValueError(
                f"KeptSets: ids_E must be int32 [{total}], as the counts (int64) say; got {self.ids_E.dtype} "
                f"{tuple(self.ids_E.shape)} with counts {self.count_BL.dtype}"
            )
        if total and min(int(self.count_BL.min()), int(self.ids_E.min())) < 0:
            raise ValueError("KeptSets: a count or an id is negative; a position without a set has count 0 and no ids")

    def at(self, position_N: Tensor) -> tuple[Tensor, Tensor]:
        """(ids_E int32, count_N int64) of flat positions (row * L + column), in their order."""
        import torch

        count = self.count_BL.flatten()
        start_N, count_N = (count.cumsum(0) - count)[position_N], count[position_N]
        before_N = count_N.cumsum(0) - count_N
        entry_E = torch.arange(int(count_N.sum())) + (start_N - before_N).repeat_interleave(count_N)
        return self.ids_E[entry_E], count_N

    def holds(self, token_ids_BL: Tensor) -> Tensor:
        """[B, L] bool: is each token in its own set? False where there is no set."""
        import torch

        position_E = torch.arange(token_ids_BL.numel()).repeat_interleave(self.count_BL.flatten())
        hit_E = self.ids_E == token_ids_BL.cpu().flatten()[position_E]
        found_N = torch.zeros(token_ids_BL.numel(), dtype=torch.bool)
        found_N[position_E[hit_E]] = True
        return found_N.view(token_ids_BL.shape)

    def require_of(self, token_ids_BL: Tensor, scored_BL: Tensor, *, what: str) -> None:
        """Raise ValueError where a scored token is not in the set that it was sampled from, if there is one."""
        wrong_BL = scored_BL.cpu() & (self.count_BL > 0) & ~self.holds(token_ids_BL)
        if bool(wrong_BL.any()):
            b, t = wrong_BL.nonzero()[0].tolist()
            raise ValueError(
                f"{what}: a scored token is not in its own kept set, so it could not have been sampled: the sets belong to other "
                f"tokens, or are not aligned to token_ids ({int(wrong_BL.sum())} tokens, the first {int(token_ids_BL[b, t])} at "
                f"sequence {b}, position {t}; entry t of the counts is about token t)"
            )

    def rows(self, index: slice | Tensor, length: int | None = None) -> KeptSets:
        """Of the sequences in `index`, or of their first `length` positions."""
        import torch

        position_bl = torch.arange(self.count_BL.numel()).view(self.count_BL.shape)[index, :length]
        ids_E, count_N = self.at(position_bl.flatten())
        return KeptSets(ids_E=ids_E, count_BL=count_N.view(position_bl.shape))

    @staticmethod
    def spread(ids_E: Tensor, count_N: Tensor, position_N: Tensor, shape: Sequence[int]) -> KeptSets:
        """The inverse of `at`: sets of ascending flat positions, and none anywhere else."""
        count = count_N.new_zeros(shape[0] * shape[1])
        count[position_N] = count_N
        return KeptSets(ids_E=ids_E, count_BL=count.view(*shape))

    @staticmethod
    def dense(kept_BLK: Tensor) -> KeptSets:
        """From [B, L, K] int64 filled up with -1."""
        import torch

        kept_BLK = kept_BLK.cpu()
        there_BLK = kept_BLK >= 0
        return KeptSets(ids_E=kept_BLK[there_BLK].to(torch.int32), count_BL=there_BLK.sum(-1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """The experts that positions of a batch went through in the rollout engine.

    experts_ELK: [E, mixture layers, K] on CPU, the positions one behind the other, row by row; uint8 up to 256 experts, else
    int16: layers * K bytes a position, or twice that. count_B: int64, how many of a row's first positions are known.
    """

    experts_ELK: Tensor
    count_B: Tensor

    def __post_init__(self) -> None:
        total = int(self.count_B.sum())
        if self.experts_ELK.ndim != 3 or len(self.experts_ELK) != total:
            raise ValueError(
                f"Routes: experts_ELK must be [{total}, layers, experts of a token], as the counts say; got "
                f"{tuple(self.experts_ELK.shape)}"
            )

    @staticmethod
    def require_whole(entries: int, shape: tuple[int, int], tokens: int, *, what: str) -> None:
        """Raise ValueError unless so many entries are whole positions, at most `tokens` of them."""
        each = shape[0] * shape[1]
        if entries and not (each and entries % each == 0 and entries // each <= tokens):
            raise ValueError(
                f"{what}: {entries} entries of experts are no whole positions of {shape[0]} layers with {shape[1]} experts, "
                f"or more than its {tokens} tokens; the routes belong to another sequence or model"
            )

    @staticmethod
    def of(rollouts: Sequence[tuple[array, tuple[int, int]]]) -> Routes | None:
        """From (entries, shape) of each rollout; None where none was captured. Raises ValueError for different shapes."""
        import torch

        shapes = {tuple(shape) for entries, shape in rollouts if entries}
        if not shapes:
            return None
        if len(shapes) > 1:
            raise ValueError(
                f"routes of one batch have the shapes {sorted(shapes)}; these are rollouts of different models"
            )
        (shape,) = shapes
        wide = any(entries.typecode == "H" for entries, _ in rollouts)
        whole = array("H" if wide else "B")
        for entries, _ in rollouts:
            whole.extend(array(whole.typecode, entries))
        experts_E = torch.frombuffer(whole, dtype=torch.int16 if wide else torch.uint8)
        each = shape[0] * shape[1]
        return Routes(
            experts_ELK=experts_E.view(-1, *shape),
            count_B=torch.tensor([len(entries) // each for entries, _ in rollouts]),
        )

    def rows(self, index: slice | Tensor) -> Routes:
        """Of the sequences in `index`."""
        import torch

        rows = torch.arange(len(self.count_B))[index]
        entry_NL = self.entries(int(self.count_B.max()))[rows]
        return Routes(experts_ELK=self.experts_ELK[entry_NL[entry_NL >= 0]], count_B=self.count_B[rows])

    def entries(self, length: int) -> Tensor:
        """[B, length] int64: where in `experts_ELK` a position is; -1 where its experts are not known."""
        import torch

        at_L = torch.arange(length)
        start_B1 = (self.count_B.cumsum(0) - self.count_B)[:, None]
        return torch.where(at_L < self.count_B[:, None], start_B1 + at_L, -1)

    def missing(self, loss_mask_BL: Tensor) -> Tensor:
        """[B] int64: positions of each row that its last masked token depends on and whose experts are not known."""
        import torch

        needed_B = (loss_mask_BL * torch.arange(loss_mask_BL.shape[1])).amax(1)
        return (needed_B - self.count_B).clamp(min=0)
