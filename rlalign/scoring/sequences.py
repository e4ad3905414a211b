"""From a query and an item to the tokens that the model reads: special tokens, pairs, truncation.

Text of one sequence is tokenised joined, as SGLang, TRL and vLLM do, so that no tokenizer puts a space of its own before an item;
what it shares with the query's own tokens is the shared part. A cross-encoder's texts are tokenised apart, as a pair. Token ids
are taken as they are, except that a pair needs its separators.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlalign.scoring.params import InvalidParams
from rlalign.scoring.scorer import ItemRefused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.scoring.params import ScoringParams
    from rlalign.scoring.scorer import Text

log = logging.getLogger("rlalign.scoring")


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
    """Builds a model's token sequences. tokenizer None: token ids only. pairs: query and item are a cross-encoder's pair.

    side: which end of a pair is cut where a request does not say; None: the tokenizer's truncation_side. prompt: what
    sentence-transformers puts before every text that is embedded.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        pairs: bool,
        max_length: int | None,
        model: str,
        side: str | None = None,
        prompt: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self.pairs = pairs
        self.max_length = max_length
        self.model = model
        self._side, self._prompt = side, prompt
        self._told = False
        self.single = Template() if tokenizer is None else _template(tokenizer, pair=False)
        self.pair = _template(tokenizer, pair=True) if pairs and tokenizer is not None else self.single
        if pairs and tokenizer is None:
            raise ValueError(f"{model}: a cross-encoder needs its tokenizer to separate query and item; none was found")

    def sequences(self, query: Text, items: Sequence[Text], params: ScoringParams) -> list[TokenSequence]:
        """One sequence an item. Raises ValueError where one is too long and no truncation was asked for."""
        if params.alone and len(query):
            raise InvalidParams(f"{self.model}: alone=True is for items without a query, and there is one", ["alone"])
        if self._prompt and isinstance(query, str) and params.task in ("embed", "token_embed"):
            query, items = (self._prompt + query, items) if query else ("", [f"{self._prompt}{item}" for item in items])
        query_ids = self._ids(query)
        return [self._sequence(i, query, query_ids, item, params) for i, item in enumerate(items)]

    def _ids(self, part: Text) -> list[int]:
        if not isinstance(part, str):
            return list(part)
        if self.tokenizer is None:
            raise ValueError(f"{self.model}: no tokenizer was found beside the model; pass token ids")
        return self.tokenizer(part, add_special_tokens=False)["input_ids"]

    def _parts(self, query: Text, query_ids: list[int], item: Text, *, item_first: bool) -> tuple[list[int], list[int]]:
        """Tokens of query and item. A token that holds the end of one text and the start of the other belongs to the second."""
        if self.pairs or not isinstance(query, str) or not query:
            return query_ids, self._ids(item)
        first, second = (item, query) if item_first else (query, item)
        alone, joined = self._ids(item) if item_first else query_ids, self._ids(f"{first}{second}")
        same = next((t for t, pair in enumerate(zip(alone, joined, strict=False)) if pair[0] != pair[1]), len(alone))
        if same < len(alone) and not self._told:
            self._told = True
            log.warning(
                "%s: %r is tokenised differently in front of %r than alone; scored is the joined text, as SGLang, TRL and vLLM "
                "read it. Pass token ids to score the tokens that a policy sampled apart",
                self.model, first[-20:], second[:20],
            )  # fmt: skip
        head, tail = joined[:same], joined[same:]
        return (tail, head) if item_first else (head, tail)

    def _frame(self, query: Text, params: ScoringParams, first: list[int], last: list[int]) -> Template:
        """Special tokens to add: none to token ids of one sequence, and none twice to text that was written with them."""
        if self.pairs:
            paired = len(query) > 0 or (params.task == "classify" and not params.alone)
            return self.pair if paired else self.single
        if not isinstance(query, str):
            return Template()
        frame, n, m = self.single, len(self.single.before), len(self.single.after)
        if n and tuple(first[:n]) == frame.before:
            frame = replace(frame, before=())
        return replace(frame, after=()) if m and tuple(last[-m:]) == frame.after else frame

    def _sequence(
        self, index: int, query_text: Text, query_ids: list[int], item_text: Text, params: ScoringParams
    ) -> TokenSequence:
        query, item = self._parts(query_text, query_ids, item_text, item_first=params.item_first)
        if not item:
            raise ItemRefused(index, " is empty: its text has no tokens")
        ends = (item, query or item) if params.item_first else (query or item, item)
        template = self._frame(query_text, params, *ends)
        cut = params.max_tokens_per_item is not None and len(item) > params.max_tokens_per_item
        item = item[: params.max_tokens_per_item]
        room = self._room(index, len(query) + len(item) + template.size, params) - template.size
        if len(query) + len(item) > room:
            query, item, cut = *self._cut(index, query, item, room, params, template.size), True
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
            raise ItemRefused(
                index,
                f": {length} tokens with its query, but {self.model} reads at most {self.max_length}; shorten it, "
                "or ask for truncation with truncate_prompt_tokens=-1",
            )
        return min(limits, default=length)

    def _cut(
        self, index: int, query: list[int], item: list[int], room: int, params: ScoringParams, special: int
    ) -> tuple[list[int], list[int]]:
        """Query and item within `room` tokens. Raises ValueError where a part would have none left: all would score alike."""
        asked = f"truncate_prompt_tokens={params.truncate_prompt_tokens}"
        if room < 1:
            raise ValueError(f"{asked} leaves no room beside the model's {special} special tokens")
        if self.pairs:
            assert self.tokenizer is not None, "pairs have one"
            side = params.truncation_side or self._side or self.tokenizer.truncation_side
            kept = _cut_longest(query, item, room, side)
            lost = (query and not kept[0]) or not kept[1]
        else:
            side = params.truncation_side or "left"
            first, second = (item, query) if params.item_first else (query, item)
            joined = [*first, *second]
            start = len(joined) - room if side == "left" else 0
            at = min(max(len(first) - start, 0), room)
            window = joined[start : start + room]
            kept = (window[at:], window[:at]) if params.item_first else (window[:at], window[at:])
            lost = not kept[1]
        if lost:
            raise ItemRefused(
                index,
                f": {asked}, cut on the {side}, leaves {'the query' if kept[1] else 'it'} no token of its own, and every "
                "such item would score alike; keep more tokens",
            )
        return kept


def _cut_longest(query: list[int], item: list[int], room: int, side: str) -> tuple[list[int], list[int]]:
    """A pair as tokenizers cut it ("longest_first"): tokens are taken from the longer part first, at one side of each."""
    short = min(len(query), len(item))
    long = max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    keep_query, keep_item = (long, short) if len(query) > len(item) else (short, long)
    if side == "right":
        return query[:keep_query], item[:keep_item]
    return query[len(query) - keep_query :] if keep_query else [], item[len(item) - keep_item :] if keep_item else []


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
