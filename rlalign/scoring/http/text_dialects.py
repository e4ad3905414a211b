"""Servers that read text only: text-embeddings-inference, infinity, OpenRLHF's reward server.

TEI       /predict, /rerank with raw_scores=true: logits. Labels come sorted by score, so /info's label2id puts them in order.
infinity  /rerank with raw_scores=true: logits of one label. Its /classify ignores raw_scores, so it is not used.
OpenRLHF  /get_reward: rewards as the model's config normalises them; nothing tells whether it does.
"""

from __future__ import annotations

from typing import Any

import msgspec

from rlalign.scoring.http.dialect import (
    Ask,
    Dialect,
    HTTPRequest,
    Served,
    activation_between,
    behind,
    chosen_card,
    entries,
    in_order,
    numbers,
    one_each,
)
from rlalign.scoring.http.transport import Call, Json, RequestFailed

PROBE = ("a", ["b", "c d"])
REFUSES = ("max_tokens_per_item", "skip_reading_prefix_cache")
RAW = "the request asks for raw_scores=true"


class TEIDialect(Dialect):
    """Text-embeddings-inference (schema of 1.7)."""

    def connect(self, ask: Ask, *, model: str | None, pairs: bool) -> Served:
        """Read /info, then ask for two scores, raw and activated."""
        found = ask(Call(path="/info"))
        stated = found if isinstance(found, dict) else {}
        kinds = stated.get("model_type")
        kind = next(iter(kinds), None) if isinstance(kinds, dict) else None
        if not isinstance(kinds, dict) or kind not in ("reranker", "classifier"):
            raise ValueError(f"the server's model is {kinds!r}; a scorer needs a reranker or a classifier")
        if model not in (None, stated["model_id"]):
            raise ValueError(f"model {model!r} is not served here; the server has {stated['model_id']}")
        self._columns = {str(name): int(at) for name, at in (kinds[kind].get("label2id") or {}).items()}
        self._rerank = kind == "reranker"
        labels = max(len(self._columns), 1)
        raw, activated = (self._probe(ask, raw=flag) for flag in (True, False))
        info = msgspec.structs.replace(
            behind("text-embeddings-inference", str(stated["model_id"])),
            revision=stated.get("model_sha"),
            num_labels=labels,
            activation=activation_between(raw, activated),
            max_length=int(stated["max_input_length"]),
            dtype=stated.get("model_dtype"),
            causal=False,
        )
        return Served(info=info, batch=int(stated.get("max_client_batch_size") or 32), refuses=REFUSES, proof=RAW)

    def call(self, request: HTTPRequest, served: Served, span: range) -> Call:
        """A reranker scores pairs with /rerank unless the pair is turned round or the query is empty."""
        cut = request.params.truncate_prompt_tokens
        if cut not in (None, -1, served.info.max_length):
            raise ValueError(
                f"truncate_prompt_tokens={cut}: the server cuts to {served.info.max_length} tokens or not at all"
            )
        common = {
            "raw_scores": True,
            "truncate": cut is not None,
            "truncation_direction": request.params.truncation_side or "right",
        }
        if self._reranks(request):
            texts = [request.items[i] for i in span]
            return Call(path="/rerank", body={**common, "query": request.query, "texts": texts, "return_text": False})
        return Call(path="/predict", body={**common, "inputs": [_pair(request, i) for i in span]})

    def values(self, request: HTTPRequest, span: range, body: Json) -> list[Any]:
        """Scores by index, or each item's labels put in the order of the head."""
        if self._reranks(request):
            return in_order(entries(body), span, "score")
        return [self._logits(labels) for labels in one_each(entries(body), span)]

    def _reranks(self, request: HTTPRequest) -> bool:
        return self._rerank and bool(request.query) and not request.params.item_first

    def _probe(self, ask: Ask, *, raw: bool) -> list:
        if self._rerank:
            body = {"query": PROBE[0], "texts": PROBE[1], "raw_scores": raw}
            return [numbers([v]) for v in in_order(entries(ask(Call(path="/rerank", body=body))), range(2), "score")]
        body = {"inputs": [[PROBE[0], item] for item in PROBE[1]], "raw_scores": raw}
        return [numbers(self._logits(labels)) for labels in entries(ask(Call(path="/predict", body=body)))]

    def _logits(self, labels: Any) -> list[Any] | None:
        """One item's scores in the order of the head; None where a label is missing, double or unknown."""
        found = {
            entry.get("label"): entry.get("score") for entry in labels or () if isinstance(entry, dict)
        }  # a label that comes twice leaves one entry too few
        columns: dict[Any, int] = self._columns or dict.fromkeys(found, 0)
        if not isinstance(labels, list) or set(found) != set(columns) or len(found) != len(labels):
            return None
        return [found[name] for name in sorted(columns, key=columns.__getitem__)]


class InfinityDialect(Dialect):
    """Infinity's reranker (0.0.7x)."""

    def connect(self, ask: Ask, *, model: str | None, pairs: bool) -> Served:
        """Choose a model, then ask it for two scores, raw and activated."""
        chosen = str(chosen_card(ask, "/models", model, alone=True).get("id"))
        body = {"model": chosen, "query": PROBE[0], "documents": PROBE[1]}
        raw, activated = (
            [
                numbers([v])
                for v in self.values(None, range(2), ask(Call(path="/rerank", body=body | {"raw_scores": flag})))
            ]
            for flag in (True, False)
        )
        activation = activation_between(raw, activated)
        info = msgspec.structs.replace(behind("infinity", chosen), num_labels=1, activation=activation, causal=False)
        return Served(
            info=info, batch=256, refuses=(*REFUSES, "item_first", "alone", "truncate_prompt_tokens"), proof=RAW
        )

    def call(self, request: HTTPRequest, served: Served, span: range) -> Call:
        """One reranking."""
        body = {"model": served.info.id, "query": request.query, "documents": [request.items[i] for i in span]}
        return Call(path="/rerank", body=body | {"raw_scores": True, "return_documents": False})

    def values(self, request: HTTPRequest | None, span: range, body: Json) -> list[Any]:
        """Scores by index."""
        return in_order(entries(body, "results"), span, "relevance_score")


class OpenRLHFDialect(Dialect):
    """OpenRLHF's reward server: one reward a text."""

    def connect(self, ask: Ask, *, model: str | None, pairs: bool) -> Served:
        """Ask for two rewards. The server says nothing of its model."""
        asked = Call(path="/get_reward", body=_get_reward(["a b", "a c d"], ["a ", "a "]))
        found = self.values(None, range(2), ask(asked))
        if any(numbers(value) is None for value in found):
            raise RequestFailed(f"the server answered a small test request with rewards {found}")
        info = behind("OpenRLHF's reward server", model or "OpenRLHF reward server")
        info = msgspec.structs.replace(info, num_labels=1)
        return Served(info=info, batch=256, refuses=(*REFUSES, "truncate_prompt_tokens", "use_activation"))

    def call(self, request: HTTPRequest, served: Served, span: range) -> Call:
        """Whole texts, and the prompt of each."""
        texts = [request.text(i) for i in span]
        return Call(path="/get_reward", body=_get_reward(texts, [str(request.query)] * len(texts)))

    def values(self, request: HTTPRequest | None, span: range, body: Json) -> list[Any]:
        """In the order of the items; `rewards`, not `scores`, which OpenRLHF keeps for its filters."""
        return one_each(entries(body, "rewards"), span)


def _get_reward(texts: list[str], prompts: list[str]) -> dict[str, Any]:
    return {"query": texts, "prompts": prompts, "labels": [""] * len(texts)}


def _pair(request: HTTPRequest, i: int) -> list[str]:
    """[query, item], or [item] alone: in a batch TEI reads a bare string as half of a pair."""
    if request.params.alone:
        return [str(request.items[i])]
    parts = [str(request.query), str(request.items[i])]
    return parts[::-1] if request.params.item_first else parts
