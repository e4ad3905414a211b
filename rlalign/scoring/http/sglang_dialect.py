"""SGLang's /v1/score, which `rlalign serve` speaks too, with more in it.

SGLang: a classifier's scores are raw logits, a causal LM's are probabilities over the whole vocabulary. It leaves hidden states
null on models that do not capture them, so a probe finds out beforehand. `rlalign serve` states all of this in /v1/models.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from rlalign.scoring.http.dialect import (
    Ask,
    HTTPRequest,
    Served,
    answer,
    behind,
    chosen_card,
    entries,
    known,
    numbers,
    one_each,
)
from rlalign.scoring.http.transport import Call, Json, RequestFailed
from rlalign.scoring.params import ModelInfo
from rlalign.scoring.result import Answer

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 256
OURS = "rlalign"  # owned_by in /v1/models
SGLANG_REFUSES = (
    "step_tag_id", "returned_token_ids", "skip_reading_prefix_cache", "truncate_prompt_tokens", "max_tokens_per_item",
)  # fmt: skip
OURS_REFUSES = ("skip_reading_prefix_cache",)


class SGLangDialect:
    """See the module."""

    name = "sglang"
    takes_ids = True

    def connect(self, ask: Ask, *, model: str | None, pairs: bool) -> Served:
        """Ask what is served; a plain SGLang server is also asked for two scores and a hidden state."""
        card = chosen_card(ask, "/v1/models", model)
        if card.get("owned_by") == OURS:
            return _ours(card)
        info = _probed(ask, card)
        return Served(info=info, batch=BATCH, refuses=SGLANG_REFUSES, proof="SGLang has no calibration of its own")

    def calls(self, request: HTTPRequest, served: Served, span: range) -> list[Call]:
        """One call."""
        params, ours = request.params, served.refuses == OURS_REFUSES
        ids = request.ids(span[0])
        body: dict[str, Any] = {
            "model": served.info.id,
            "query": request.query if ids is None else [],
            "items": [request.items[i] if ids is None else request.ids(i) for i in span],
            "item_first": params.item_first and ids is None,
            "return_pooled_hidden_states": params.return_pooled_hidden_states,
        }
        if not served.info.causal and ids is not None:  # the server puts a pair's separators between them
            body |= {"query": request.query, "items": [request.items[i] for i in span]}
        if params.task == "generative":
            body["label_token_ids"] = request.labels[span[0]]
        if ours:
            body |= {
                "task": params.task,
                "calibrate": False,
                "use_activation": None,
                "encoding_format": "base64",
                "alone": params.alone,
            }
            names = ("step_tag_id", "returned_token_ids")
            body |= {name: getattr(params, name) for name in names if getattr(params, name) is not None}
        if ours and request.sequences is None:
            names = ("truncate_prompt_tokens", "truncation_side", "max_tokens_per_item")
            body |= {name: getattr(params, name) for name in names if getattr(params, name) is not None}
        return [Call(path="/v1/score", body=body)]

    def answers(self, request: HTTPRequest, served: Served, span: range, bodies: Sequence[Json]) -> list[Answer]:
        """In the order of the items: SGLang's entries have no index."""
        body = bodies[0]
        if not isinstance(body, dict):
            raise RequestFailed(f"the answer is a list, expected an object: {str(body)[:200]}")
        ours = "logits" in body
        judge = request.params.task == "generative"
        values = one_each(entries(body, "logits" if ours else "scores"), span)
        reasons = one_each(entries(body, "errors"), span) if ours else [None] * len(span)
        states: list[Any] = [None] * len(span)
        if request.params.return_pooled_hidden_states:
            states = one_each(entries(body, "pooled_hidden_states"), span)
        shape = (-1, -1) if request.params.task in ("token_classify", "token_embed") else (-1,)
        found = []
        for i, value, reason, state in zip(span, values, reasons, states, strict=True):
            if value is None and reason is not None:
                found.append(replace(known(request, i), error=f"server: {reason}"))
                continue
            one = answer(value, request, i, shape=shape, probabilities=judge and not ours)
            found.append(_with_state(one, state) if request.params.return_pooled_hidden_states else one)
        return found


def _ours(card: dict[str, Any]) -> Served:
    """What `rlalign serve` says of itself. Its calibration is switched off in every request, so scores are raw."""
    try:
        info = msgspec.convert(card["info"], ModelInfo)
    except (KeyError, msgspec.ValidationError) as error:
        raise RequestFailed(f"/v1/models describes its model in a way this client does not know ({error})") from error
    info = msgspec.structs.replace(info, id=str(card["id"]), calibration_id=None)
    return Served(info=info, batch=BATCH, refuses=OURS_REFUSES, proof="the request asks for calibrate=false")


def _probed(ask: Ask, card: dict[str, Any]) -> ModelInfo:
    scoring = {"model": card["id"], "query": [1, 2], "items": [[3], [2, 3]]}
    labels, generative, exposes = 0, False, False
    try:
        first = entries(ask(Call(path="/v1/score", body=scoring)), "scores")
        labels = len(first[0]) if isinstance(first[0], list) else 1
    except RequestFailed as error:
        if error.status != 400:
            raise
        generative = True
        entries(ask(Call(path="/v1/score", body=scoring | {"label_token_ids": [1, 2]})), "scores")
    if not generative:
        try:
            body = ask(Call(path="/v1/score", body=scoring | {"return_pooled_hidden_states": True}))
            found = body.get("pooled_hidden_states") if isinstance(body, dict) else None
            exposes = isinstance(found, list) and all(state is not None for state in found)
        except RequestFailed as error:
            if error.status != 400:
                raise
    length = card.get("max_model_len")
    return msgspec.structs.replace(
        behind("SGLang's server", str(card["id"])),
        tasks=("generative",) if generative else ("classify",),
        num_labels=labels,
        activation="softmax" if labels > 1 else "sigmoid",
        max_length=int(length) if isinstance(length, int) else None,
        exposes_hidden_states=exposes,
        hidden_states_reason="" if exposes else "the server returned none when it was asked for one",
    )


def _with_state(found: Answer, state: Any) -> Answer:
    if found.values is None:
        return found
    tensor = _state(state)
    if tensor is None:
        reason = f"the server returned no pooled hidden state, but {str(state)[:60]}"
        return replace(found, values=None, error=reason)
    return replace(found, state=tensor)


def _state(value: Any) -> Tensor | None:
    """[D] float32 from a list of numbers, or from base64 of little-endian float32; None for anything else."""
    import torch

    if isinstance(value, str):
        try:
            array = np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4")
        except ValueError:
            return None
    else:
        array = numbers(value)
    if array is None or array.ndim != 1 or not array.size or not np.isfinite(array).all():
        return None
    return torch.from_numpy(array.astype(np.float32))
