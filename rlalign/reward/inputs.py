"""Queries and items as every backend accepts them: all text or all token ids, never empty items, no id outside the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from rlalign.reward.scorer import Text


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
            raise ValueError(f"item {i} is empty: it has no token of its own whose state could be scored")
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
