"""From a query and an item to the tokens that the model reads: special tokens, pairs, truncation.

Text is tokenised in parts, so that a score does not depend on whether its query was shared: special tokens before the query and
after the item, query and item each on their own. Token ids are taken as they are, except that a cross-encoder's pair needs
its separators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.scoring.params import ScoringParams
    from rlalign.scoring.scorer import Text


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """What the model reads for one item: `shared` (up to the end of the query), then `own`; type_ids only for encoders."""

    shared: tuple[int, ...]
    own: tuple[int, ...]
    type_ids: tuple[int, ...] | None = None
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.shared) + len(self.own)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """Special tokens around a query and an item, with the token type (segment) of each; types are None without them."""

    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    types: tuple[int, int, int, int, int] | None = None  # of before, query, between, item, after

    @property
    def size(self) -> int:
        """Special tokens in all."""
        return len(self.before) + len(self.between) + len(self.after)


class Sequencer:
    """Builds a model's token sequences. tokenizer None: token ids only. pairs: query and item are a cross-encoder's pair."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, *, pairs: bool, max_length: int | None, model: str
    ) -> None:
        self.tokenizer = tokenizer
        self.pairs = pairs
        self.max_length = max_length
        self.model = model
        self.single = Template() if tokenizer is None else _template(tokenizer, pair=False)
        self.pair = _template(tokenizer, pair=True) if pairs and tokenizer is not None else self.single
        if pairs and tokenizer is None:
            raise ValueError(f"{model}: a cross-encoder needs its tokenizer to separate query and item; none was found")

    def sequences(self, query: Text, items: Sequence[Text], params: ScoringParams) -> list[TokenSequence]:
        """One sequence an item. Raises ValueError where one is too long and no truncation was asked for."""
        query_ids, with_special = self._ids(query), isinstance(query, str) or self.pairs
        return [self._sequence(i, query_ids, self._ids(item), params, with_special) for i, item in enumerate(items)]

    def _ids(self, part: Text) -> list[int]:
        if not isinstance(part, str):
            return list(part)
        if self.tokenizer is None:
            raise ValueError(f"{self.model}: no tokenizer was found beside the model; pass token ids")
        return self.tokenizer(part, add_special_tokens=False)["input_ids"]

    def _sequence(
        self, index: int, query: list[int], item: list[int], params: ScoringParams, with_special: bool
    ) -> TokenSequence:
        template = (self.pair if query else self.single) if with_special else Template()
        if not item:
            raise ValueError(f"item {index} is empty: its text has no tokens")
        cut = params.max_tokens_per_item is not None and len(item) > params.max_tokens_per_item
        item = item[: params.max_tokens_per_item]
        room = self._room(index, len(query) + len(item) + template.size, params) - template.size
        if len(query) + len(item) > room:
            if room < 1:
                raise ValueError(
                    f"truncate_prompt_tokens={params.truncate_prompt_tokens} leaves no room beside the model's "
                    f"{template.size} special tokens"
                )
            query, item, cut = *(_cut_longest if self.pairs else _cut_left)(query, item, room), True
        first, second = (item, query) if params.item_first else (query, item)
        types = None
        if template.types is not None:
            lengths = (len(template.before), len(first), len(template.between), len(second), len(template.after))
            types = tuple(t for t, n in zip(template.types, lengths, strict=True) for _ in range(n))
        head, tail = (*template.before, *first), (*template.between, *second, *template.after)
        if params.item_first:
            head, tail = (), (*head, *tail)
        return TokenSequence(shared=head, own=tail, type_ids=types, truncated=cut)

    def _room(self, index: int, length: int, params: ScoringParams) -> int:
        limits = [n for n in (params.truncate_prompt_tokens, self.max_length) if n is not None]
        if params.truncate_prompt_tokens is None and self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"item {index}: {length} tokens with its query, but {self.model} reads at most {self.max_length}; shorten it, "
                "or ask for truncation with truncate_prompt_tokens=-1"
            )
        return min(limits, default=length)


def _cut_left(query: list[int], item: list[int], room: int) -> tuple[list[int], list[int]]:
    """The last `room` tokens of query and item together."""
    kept = max(room - len(item), 0)
    return query[len(query) - kept :], item[-room:]


def _cut_longest(query: list[int], item: list[int], room: int) -> tuple[list[int], list[int]]:
    """The last tokens of each, taken from the longer one first: a reranker without its query would rank nothing."""
    short = min(len(query), len(item))
    long = max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    keep_query, keep_item = (long, short) if len(query) > len(item) else (short, long)
    return query[len(query) - keep_query :] if keep_query else [], item[len(item) - keep_item :]


def _template(tokenizer: PreTrainedTokenizerBase, *, pair: bool) -> Template:
    """Read the special tokens off an encoded probe. Raises RuntimeError where the parts cannot be found in it."""
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("one", "two two"))
    encoded = tokenizer("one", "two two") if pair else tokenizer("one")
    ids = encoded["input_ids"]
    at = _find(ids, first, 0)
    then = _find(ids, second, at + len(first)) if pair and at >= 0 else at
    if at < 0 or then < 0:
        raise RuntimeError(
            f"{tokenizer.name_or_path}: encoding a probe with special tokens gave {ids}, which does not contain the probe's own "
            f"tokens {first} and {second}; pass token ids instead of text"
        )
    end = then + (len(second) if pair else len(first))
    between = ids[at + len(first) : then] if pair else []
    types = encoded.get("token_type_ids")
    if types is not None:
        types = tuple(
            types[min(i, len(types) - 1)] for i in (0, at, min(at + len(first), then), then, min(end, len(ids) - 1))
        )
    return Template(before=tuple(ids[:at]), between=tuple(between), after=tuple(ids[end:]), types=types)


def _find(ids: list[int], part: list[int], start: int) -> int:
    found = (i for i in range(start, len(ids) - len(part) + 1) if ids[i : i + len(part)] == part)
    return next(found, -1) if part else -1
