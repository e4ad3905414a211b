"""Ids that no text has: rows of the model behind the tokenizer's last id, or between its ids. Samplers draw them like others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["UnknownIds"]


@dataclass(frozen=True, slots=True)
class UnknownIds:
    """first: the id from which on the tokenizer has none; behind: rows from there on; between: ids missing before."""

    first: int
    behind: int
    between: int

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, rows: int) -> UnknownIds:
        """rows: of the model's vocabulary."""
        known = {i for i in tokenizer.get_vocab().values() if i < rows}
        first = max(known, default=-1) + 1
        return UnknownIds(first=first, behind=rows - first, between=first - len(known))

    def describe(self, rows: int) -> str:
        """One line, for the doctor."""
        if not self.behind and not self.between:
            return f"each of the model's {rows} rows is an id of the tokenizer"
        where = f"{self.behind} from id {self.first} on" + (
            f", {self.between} between the others" if self.between else ""
        )
        return f"{self.behind + self.between} of the model's {rows} rows are ids that no text has ({where})"

    def bar(self) -> int:
        """The number of ids to sample from. Raises ValueError where ids in between would stay."""
        if self.between:
            raise ValueError(
                f"rollout.bar_unknown_ids: {self.between} ids below the tokenizer's last one belong to no token, and only ids "
                "behind it can be left out on both sides; use a tokenizer without holes, or bar_unknown_ids=false"
            )
        return self.first if self.behind else 0
