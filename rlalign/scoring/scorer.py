"""The contract of every scoring backend: prepare (checks and tokens), run (one batch), and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rlalign.scoring.params import ModelInfo, ScoringParams
    from rlalign.scoring.result import ScoreResult

Text = str | Sequence[int]  # a string, or token ids


class ItemRefused(ValueError):
    """One item that cannot be scored, whatever the others are. reason: without the item's number."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"item {index}{reason}")
        self.reason = f"the item{reason}"


class Prepared(Protocol):
    """One request, checked, resolved and tokenised: ready to run in any batch."""

    num_tokens: int  # the model will read; what a batch's budget is counted in


class RewardScorer(Protocol):
    """Scores items against a query. `score` is `run([prepare(...)])[0]`; a server batches the prepared requests of many."""

    info: ModelInfo

    def prepare(self, query: Text, items: Text | Sequence[Text], params: ScoringParams | None = None) -> Prepared:
        """Check a request and tokenise it. Raises ValueError before any computation."""

    def run(self, requests: Sequence[Prepared]) -> list[ScoreResult]:
        """Score prepared requests together. An item's result does not depend on what else is in the batch."""

    def score(self, query: Text, items: Text | Sequence[Text], params: ScoringParams | None = None) -> ScoreResult:
        """Score one request now."""


def checked_inputs(query: Text, items: Text | Sequence[Text], vocab_size: int) -> tuple[Text, list[Text]]:
    """The query and the list of items. A bare string, or a bare list of token ids, is one item; the query may be empty.

    Raises ValueError on no items at all (None), an empty item, text mixed with token ids, and a bool, negative or too large id.
    An empty list of items is fine: there is nothing to score.
    """
    if items is None:
        raise ValueError("items must be provided: a text, a list of texts, or a list of token id lists")
    if query is None:
        raise ValueError("query must be provided; an empty text or an empty list of token ids scores the items alone")
    listed = [items] if isinstance(items, str) or (len(items) > 0 and _is_id(items[0])) else list(items)
    kinds = {isinstance(part, str) for part in (query, *listed)}
    if len(kinds) > 1:
        raise ValueError(
            "Invalid combination of query/items types: query and items must be all text or all token ids; got "
            f"{_kind(query)} as the query and {', '.join(sorted({_kind(item) for item in listed}))} as items"
        )
    for i, item in enumerate(listed):
        if len(item) == 0:
            raise ItemRefused(i, " is empty: it has no token of its own whose state could be scored")
    if not isinstance(query, str):
        for what, ids in (("query", query), *((f"item {i}", item) for i, item in enumerate(listed))):
            _check_ids(ids, vocab_size, what)
    return query, listed


def _check_ids(ids: Sequence[int], vocab_size: int, what: str) -> None:
    for position, token in enumerate(ids):
        if not _is_id(token) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise ValueError(f"{what}: {token!r} at position {position} is not a token id from 0 to {vocab_size - 1}")


def _is_id(value: object) -> bool:
    return isinstance(value, int)


def _kind(part: Text) -> str:
    return "text" if isinstance(part, str) else "token ids"
