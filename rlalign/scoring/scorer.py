"""The contract of every scoring backend, and what follows from it: scores now, later, of conversations, as a trainer's reward."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard, TypeVar, cast

import msgspec

from rlalign.scoring.params import InvalidParams, ScoringParams, per_item_labels
from rlalign.scoring.result import ScoreResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.scoring.params import ModelInfo

Text = str | Sequence[int]  # a string, or token ids


class ItemRefused(ValueError):
    """One item that cannot be scored, whatever the others are. reason: without the item's number."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"item {index}{reason}")
        self.reason = f"the item{reason}"


class Prepared(Protocol):
    """One request, checked, resolved and tokenised: ready to run in any batch."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the model will read; what a batch's budget is counted in."""
        ...


P = TypeVar("P", bound=Prepared)


class RewardScorer(Protocol[P]):
    """Scores items against a query. `score` is `run([prepare(...)])[0]`; a server batches the prepared requests of many."""

    info: ModelInfo

    def prepare(self, query: Text, items: Text | Sequence[Text], params: ScoringParams | None = None) -> P:
        """Check a request and tokenise it. Raises ValueError before any computation."""
        ...

    def run(self, requests: Sequence[P]) -> list[ScoreResult]:
        """Score prepared requests together. What else is in the batch does not matter, to the rounding of the body's dtype.

        Batches of another shape add up in another order: about 1e-6 in float32, and some 1e-3 of a bf16 body's logits.
        """
        ...

    def score(self, query: Text, items: Text | Sequence[Text], params: ScoringParams | None = None) -> ScoreResult:
        """Score one request now."""
        ...


def checked_inputs(query: Text, items: Text | Sequence[Text], vocab_size: int) -> tuple[Text, list[Text]]:
    """The query and the list of items. A bare string, or a bare list of token ids, is one item; the query may be empty.

    Raises ValueError on no items at all (None), an empty item, text mixed with token ids, and a bool, negative or too large id.
    An empty list of items is fine: there is nothing to score.
    """
    if items is None:
        raise ValueError("items must be provided: a text, a list of texts, or a list of token id lists")
    if query is None:
        raise ValueError("query must be provided; an empty text or an empty list of token ids scores the items alone")
    listed = [items] if is_one_text(items) else list(cast("Sequence[Text]", items))
    kinds = {isinstance(part, str) for part in (query, *listed)}
    if len(kinds) > 1:
        raise ValueError(
            "Invalid combination of query/items types: query and items must be all text or all token ids; got "
            f"{_kind(query)} as the query and {', '.join(sorted({_kind(item) for item in listed}))} as items"
        )
    for i, item in enumerate(listed):
        if len(item) == 0:
            raise ItemRefused(i, " is empty: it has no token of its own whose state could be scored")
    for what, ids in (("query", query), *((f"item {i}", item) for i, item in enumerate(listed))):
        for position, token in enumerate(ids if not isinstance(ids, str) else ()):
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise ValueError(
                    f"{what}: {token!r} at position {position} is not a token id from 0 to {vocab_size - 1}"
                )
    return query, listed


def is_one_text(given: Text | Sequence[Text]) -> TypeGuard[Text]:
    """True for a string and for a list of token ids, False for a list of either."""
    return isinstance(given, str) or (len(given) > 0 and isinstance(given[0], int))


def _kind(part: Text) -> str:
    return "text" if isinstance(part, str) else "token ids"


log = logging.getLogger("rlalign.scoring")
Message = Mapping[str, str]
Conversation = str | Sequence[Message]  # plain text, or a chat
RewardFunc = Callable[..., Awaitable[list[float | None]]]


class Scoring(RewardScorer[P]):
    """The methods that every backend shares; a backend adds `info`, `tokenizer`, `prepare` and `run`."""

    tokenizer: PreTrainedTokenizerBase | None

    def score(self, query: Text, items: Text | Sequence[Text], params: ScoringParams | None = None) -> ScoreResult:
        """Score items against a query, in their order. Raises ValueError before any computation on a bad request."""
        return self.run([self.prepare(query, items, params)])[0]

    async def ascore(
        self, query: Text, items: Text | Sequence[Text], params: ScoringParams | None = None
    ) -> ScoreResult:
        """The same without blocking the event loop."""
        request = self.prepare(query, items, params)
        return (await asyncio.to_thread(self.run, [request]))[0]

    def score_conversations(
        self,
        prompts: Sequence[Conversation],
        completions: Sequence[Conversation],
        params: ScoringParams | None = None,
    ) -> ScoreResult:
        """Score completions, each behind its own prompt; entry i is about pair i.

        Plain texts: the prompt is the query and the completion the item. Chats (lists of messages) go through the chat
        template of the reward model's own tokenizer. Completions of the same prompt share its computation. A completion that
        cannot be scored (empty, too long) becomes an error of its own; a request that is wrong as a whole raises ValueError.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"expected one completion a prompt, got {len(prompts)} and {len(completions)}")
        params = params or ScoringParams()
        params.verify(self.info)
        requests: list[P] = []
        places: list[list[int]] = []
        errors: dict[int, str] = {}
        same: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            same.setdefault(repr(prompt), []).append(i)
        for members in same.values():
            for place, query, items in self._queries(prompts, completions, members):
                request, kept, refused = prepared_each(self, query, items, params, ValueError)
                errors |= {place[i]: reason for i, reason in refused.items()}
                if request is not None:
                    requests.append(request)
                    places.append([place[i] for i in kept])
        return in_order(self.run(requests), places, errors, len(prompts), self.info.id)

    def as_reward_func(
        self,
        *,
        params: ScoringParams | None = None,
        label_index: int | None = None,
        on_error: Literal["none", "raise"] = "none",
    ) -> RewardFunc:
        """An async reward function as TRL's trainers call it: prompts, completions and the data's columns in, rewards out.

        on_error: "none" gives None for a sample without a score (TRL leaves it out) and logs the reason; "raise" raises
        RuntimeError. label_index: which label is the reward, for models with several.
        """
        if on_error not in ("none", "raise"):
            raise ValueError(f"on_error: expected 'none' or 'raise', got {on_error!r}")

        async def reward(
            prompts: Sequence[Conversation],
            completions: Sequence[Conversation],
            log_metric: Callable[[str, float], None] | None = None,
            **columns: Any,  # TRL passes completion_ids, trainer_state, log_extra and every column of the data set
        ) -> list[float | None]:
            result = await asyncio.to_thread(self.score_conversations, prompts, completions, params)
            failed = [f"sample {i}: {error}" for i, error in enumerate(result.errors) if error is not None]
            if failed and on_error == "raise":
                raise RuntimeError(
                    f"{result.model}: {len(failed)} of {len(result)} samples have no reward; {failed[0]}"
                )
            if failed:
                log.warning(
                    "%s: %d of %d samples have no reward; %s", result.model, len(failed), len(result), failed[0]
                )
            if log_metric is not None:
                log_metric(f"{reward.__name__}/failed_frac", len(failed) / max(len(result), 1))
            return result.rewards(label_index)

        reward.__name__ = self.info.id.rstrip("/").rpartition("/")[2] or "reward_model"
        return reward

    def _queries(
        self, prompts: Sequence[Conversation], completions: Sequence[Conversation], members: list[int]
    ) -> list[tuple[list[int], Text, list[Text]]]:
        """(places, query, items) of the completions `members` of one prompt: chats as token ids that share a prefix."""
        prompt = prompts[members[0]]
        if isinstance(prompt, str):
            texts: list[Text] = []
            for i in members:
                completion = completions[i]
                if not isinstance(completion, str):
                    raise ValueError(f"pair {i}: a text prompt with a chat completion; give both in the same form")
                texts.append(completion)
            return [(members, prompt, texts)]
        found = (completions[i] for i in members)
        answers = [[{"role": "assistant", "content": one}] if isinstance(one, str) else one for one in found]
        chats = [self._chat_ids([*prompt, *answer]) for answer in answers]
        shared = _common_prefix(chats)
        return [(members, chats[0][:shared], [ids[shared:] for ids in chats])]

    def _chat_ids(self, messages: list[Message]) -> list[int]:
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise ValueError(
                f"{self.info.id}: a chat needs a tokenizer with a chat template, and this scorer has none; pass texts"
            )
        if not self.info.causal:
            raise ValueError(f"{self.info.id}: a cross-encoder reads a query and an item, not a chat; pass texts")
        text = self.tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False)
        return self.tokenizer(cast("str", text), add_special_tokens=False)["input_ids"]


def prepared_each(
    scorer: RewardScorer[P], query: Text, items: Sequence[Text], params: ScoringParams, refusals: type[ValueError]
) -> tuple[P | None, list[int], dict[int, str]]:
    """(request of the items that can be scored, their places, place -> reason of those that cannot).

    Raises InvalidParams, and every ValueError that is none of `refusals`: then the request is wrong as a whole.
    """
    places, reasons = list(range(len(items))), {}
    try:
        return scorer.prepare(query, items, params), places, reasons
    except InvalidParams:
        raise
    except refusals:
        for i in places:
            try:
                scorer.prepare(query, [items[i]], _labels_of(params, [i]))
            except refusals as error:
                reasons[i] = error.reason if isinstance(error, ItemRefused) else str(error)
    places = [i for i in places if i not in reasons]
    left = [items[i] for i in places]
    return (scorer.prepare(query, left, _labels_of(params, places)) if left else None), places, reasons


def _labels_of(params: ScoringParams, places: Sequence[int]) -> ScoringParams:
    """The parameters of some items only: a judge may have labels for each."""
    labels = params.label_token_ids
    if labels is None or not per_item_labels(labels):
        return params
    return msgspec.structs.replace(params, label_token_ids=[labels[i] for i in places])


def _common_prefix(sequences: list[list[int]]) -> int:
    """Tokens that all sequences begin with, leaving each at least one of its own; 0 for a sequence alone."""
    if len(sequences) == 1:
        return 0
    longest = min(map(len, sequences)) - 1
    first = sequences[0]
    return next((t for t in range(longest) if any(ids[t] != first[t] for ids in sequences)), max(longest, 0))


def in_order(
    results: list[ScoreResult], places: list[list[int]], errors: dict[int, str], count: int, model: str
) -> ScoreResult:
    """One result with entry i for the item at place i, or its error. All results have the same parameters and calibration."""
    found = {i: (result, row) for result, at in zip(results, places, strict=True) for row, i in enumerate(at)}
    first = results[0] if results else ScoreResult(logits=[], scores=[], prompt_tokens=[], errors=[], model=model)

    def column(name: str, missing: Any) -> list | None:
        if getattr(first, name) is None:
            return None
        return [getattr(found[i][0], name)[found[i][1]] if i in found else missing for i in range(count)]

    return replace(
        first,
        **{
            name: column(name, None)
            for name in ("logits", "scores", "pooled_hidden_states", "token_logprobs", "label_mass")
        },
        prompt_tokens=column("prompt_tokens", 0),
        truncated=column("truncated", False),
        errors=[found[i][0].errors[found[i][1]] if i in found else errors[i] for i in range(count)],
    )
