"""What HTTPScorer asks of a dialect, and the reading of answers that all dialects share.

A dialect turns a prepared request into HTTP calls and their JSON into one Answer an item. It never guesses: an answer that is
missing, out of order beyond repair, or of another shape is an error of its item, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from rlalign.scoring.http.transport import Call, Json, RequestFailed
from rlalign.scoring.params import ModelInfo
from rlalign.scoring.result import Answer, activate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlalign.scoring.params import Activation, ScoringParams
    from rlalign.scoring.scorer import Text
    from rlalign.scoring.sequences import TokenSequence

Ask = Callable[[Call], Json]  # sends a call and returns its JSON; raises RequestFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class HTTPRequest:
    """A checked request. sequences: one an item where the client tokenises, None where the server does.

    labels: a judge's label tokens of each item.
    """

    params: ScoringParams
    query: Text
    items: list[Text]
    sequences: list[TokenSequence] | None = None
    labels: list[list[int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that the model will read; for text that the server tokenises, its UTF-8 bytes, which are never fewer."""
        if self.sequences is not None:
            return sum(map(len, self.sequences))
        return sum(len(_bytes(self.query)) + len(_bytes(item)) for item in self.items)

    def ids(self, i: int) -> list[int] | None:
        """Item i's whole sequence as token ids, None for text."""
        if self.sequences is not None:
            return [*self.sequences[i].shared, *self.sequences[i].own]
        if isinstance(self.query, str):
            return None
        item, query = cast("Sequence[int]", self.items[i]), self.query
        return [*item, *query] if self.params.item_first else [*query, *item]

    def text(self, i: int) -> str:
        """Item i's whole sequence as text."""
        parts = (str(self.query), str(self.items[i]))
        return "".join(reversed(parts) if self.params.item_first else parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a probe found. batch: items of one call; refuses: parameters of ours that the server has no word for.

    proof: how it is known that scores arrive as the head gave them; empty where nothing proves it.
    """

    info: ModelInfo
    batch: int
    refuses: tuple[str, ...] = ()
    proof: str = ""


def behind(server: str, id: str) -> ModelInfo:
    """What is known of any model behind a server: a classifier whose vocabulary and width the server knows, and answers 400."""
    return ModelInfo(
        id=id,
        architecture=f"behind {server}",
        tasks=("classify",),
        vocab_size=2**31,
        hidden_size=0,
        hidden_states_reason="the server's scores come without hidden states",
        packing_reason="the server decides",
    )


def chosen_card(ask: Ask, path: str, model: str | None, *, alone: bool = False) -> dict[str, Any]:
    """The card of `model` in a list of models; without a name that of the first, which with `alone` must be the only one.

    Raises ValueError where it is not served.
    """
    cards = [card for card in entries(ask(Call(path=path)), "data") if isinstance(card, dict)]
    chosen = [card for card in cards if model in (None, card.get("id"))]
    names = ", ".join(str(card.get("id")) for card in cards) or "none"
    if model is None and alone and len(cards) != 1:
        raise ValueError(f"the server has {len(cards)} models ({names}): say which, with model=")
    if not chosen:
        raise ValueError(f"model {model!r} is not served here; the server has {names}")
    return chosen[0]


class Dialect:
    """One server's language: `connect`, `call` and `values`, where one call gives each item the logits of its labels."""

    takes_ids = False  # token ids instead of text

    def connect(self, ask: Ask, *, model: str | None, pairs: bool) -> Served:
        """Find out what is served, with a few small requests. Raises RequestFailed, or ValueError where it cannot score."""
        raise NotImplementedError

    def call(self, request: HTTPRequest, served: Served, span: range) -> Call:
        """What to send for the items in `span`."""
        raise NotImplementedError

    def values(self, request: HTTPRequest, span: range, body: Json) -> list[Any]:
        """What each item of `span` got, in their order, None for nothing. Raises RequestFailed on a body of another shape."""
        raise NotImplementedError

    def calls(self, request: HTTPRequest, served: Served, span: range) -> list[Call]:
        """All that is to be sent for the items in `span`."""
        return [self.call(request, served, span)]

    def answers(self, request: HTTPRequest, served: Served, span: range, bodies: Sequence[Json]) -> list[Answer]:
        """One answer an item of `span`. Raises RequestFailed on a body of another shape."""
        values, shape = self.values(request, span, bodies[0]), (served.info.num_labels,)
        return [answer(value, request, i, shape=shape) for i, value in zip(span, values, strict=True)]


def entries(body: Json, *path: str) -> list[Any]:
    """The list at a path of keys. Raises RequestFailed where there is none."""
    found: Any = body
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, list):
        raise RequestFailed(f"the answer has no list at {'.'.join(path) or 'its top'}: {str(body)[:200]}")
    return found


def in_order(found: Sequence[Any], span: range, value: str) -> list[Any]:
    """What each item got under `value`, by the entries' `index` (rerankers sort by score); None for items that got nothing.

    Raises RequestFailed on an index that is no item's, or that comes twice: then no entry can be trusted.
    """
    placed: list[Any] = [None] * len(span)
    seen: set[int] = set()
    for entry in found:
        index = entry.get("index") if isinstance(entry, dict) else None
        if not isinstance(index, int) or not 0 <= index < len(span) or index in seen:
            raise RequestFailed(f"the answer's entry {str(entry)[:100]} belongs to none of the {len(span)} items")
        seen.add(index)
        placed[index] = entry.get(value)
    return placed


def one_each(found: Sequence[Any], span: range) -> list[Any]:
    """A list whose order is the items'. Raises RequestFailed on another length: there is no telling which are missing."""
    if len(found) != len(span):
        raise RequestFailed(f"the answer has {len(found)} scores for {len(span)} items")
    return list(found)


def answer(value: Any, request: HTTPRequest, i: int, *, shape: tuple[int, ...], probabilities: bool = False) -> Answer:
    """An Answer of a number or (nested) list. shape: expected, -1 for any length; other shapes are errors.

    probabilities: the values are label probabilities; their logarithms are taken in float64, where 1e-50 is not 0.
    """
    facts = known(request, i)
    if value is None:
        return replace(facts, error="the server returned no score for this item")
    values = numbers(value)
    if values is None:
        return replace(facts, error=f"the server's score is not numbers: {str(value)[:100]}")
    if values.ndim == 0:
        values = values[None]
    if values.ndim != len(shape) or any(want not in (-1, got) for want, got in zip(shape, values.shape, strict=True)):
        return replace(facts, error=f"the server's score has shape {values.shape}, expected {shape} (-1: any)")
    if probabilities:
        if not ((values > 0) & (values <= 1 + 1e-5)).all():
            return replace(facts, error=f"the server's label probabilities are {values.tolist()}, expected (0, 1]")
        values = np.log(values)
    return replace(facts, values=values.astype(np.float32))


def known(request: HTTPRequest, i: int) -> Answer:
    """prompt_tokens and truncated of item i, without values; 0 tokens where only the server knows."""
    if request.sequences is not None:
        return Answer(prompt_tokens=len(request.sequences[i]), truncated=request.sequences[i].truncated)
    return Answer(prompt_tokens=len(request.ids(i) or ()))


def numbers(value: Any) -> NDArray[np.float64] | None:
    """float64 of a number or a rectangular list of numbers, None for anything else (null, text, ragged, booleans)."""
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return array.astype(np.float64) if array.dtype.kind in "iuf" else None


def _bytes(part: Text) -> bytes | Sequence[int]:
    return part.encode() if isinstance(part, str) else part


CANDIDATES: tuple[Activation, ...] = ("identity", "sigmoid", "softmax")
TOLERANCE = 5e-3  # a server may compute its activation in bf16


def activation_between(
    raw: Sequence[NDArray[np.float64] | None], activated: Sequence[NDArray[np.float64] | None]
) -> Activation:
    """The function that takes raw scores [K] to the activated ones, so that ours can do the same.

    Raises RequestFailed where it is none of identity, sigmoid and softmax: then "raw" scores are not what they are called.
    """

    def rows(scores: Sequence[NDArray[np.float64] | None]) -> NDArray[np.float64]:
        finite = [np.atleast_2d(x) for x in scores if x is not None and np.isfinite(x).all()]
        if len(finite) < len(scores):
            raise RequestFailed("the server answered a small test request with scores that are not finite numbers")
        return np.concatenate(finite).astype(np.float64)

    before, after = rows(raw), rows(activated)
    for name in CANDIDATES if before.shape[-1] > 1 else CANDIDATES[:2]:
        if before.shape == after.shape and np.allclose(activate(before, name), after, rtol=TOLERANCE, atol=TOLERANCE):
            return name
    raise RequestFailed(
        f"the server's raw scores {before[0].round(4).tolist()} become {after[0].round(4).tolist()}, by none of "
        f"{', '.join(CANDIDATES)}: its raw scores are not logits"
    )
