"""Engines that take token ids: vLLM's server, and SGLang's /v1/score, which `rlalign serve` speaks too, with more in it.

vLLM: /pooling for its four pooling tasks, /score for a cross-encoder's pairs, /generative_scoring for judges. Scores are asked for
with use_activation=false, since its default is the activated score. PoolerConfig's logit_mean and logit_sigma act on them all the
same, and only the development endpoint /server_info shows whether they are set.
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
    Dialect,
    HTTPRequest,
    Served,
    activation_between,
    answer,
    behind,
    chosen_card,
    entries,
    in_order,
    known,
    numbers,
    one_each,
)
from rlalign.scoring.http.transport import Call, Json, RequestFailed
from rlalign.scoring.params import ModelInfo, PoolerDefaults, Task
from rlalign.scoring.result import Answer

if TYPE_CHECKING:
    from torch import Tensor

    from rlalign.scoring.params import Activation


PROBE = [[1, 2, 3], [3, 2]]  # token ids that every vocabulary has
SHAPES: dict[Task, tuple[int, ...]] = {
    "classify": (-1,),
    "token_classify": (-1, -1),
    "embed": (-1,),
    "token_embed": (-1, -1),
}
BATCH = 256
REFUSES = ("max_tokens_per_item", "step_tag_id", "returned_token_ids", "skip_reading_prefix_cache")


class VLLMDialect(Dialect):
    """vLLM's server."""

    takes_ids = True

    def connect(self, ask: Ask, *, model: str | None, pairs: bool) -> Served:
        """Ask for the model, its task, its labels, its activation, and (development mode) its PoolerConfig."""
        card = chosen_card(ask, "/v1/models", model)
        if card.get("max_model_len") is None:
            raise RequestFailed("/v1/models states no max_model_len: this is not a vLLM server")
        task, labels, activation = _what_it_does(ask, card["id"], pairs)
        pooler, proof = _pooler(ask)
        info = msgspec.structs.replace(
            behind("vLLM's server", str(card["id"])),
            tasks=(task,),
            hidden_size=labels if task in ("embed", "token_embed") else 0,
            num_labels=labels if task in ("classify", "token_classify") else 0,
            activation=activation,
            max_length=int(card["max_model_len"]) - (task == "generative"),
            causal=not pairs,
            hidden_states_reason="vLLM's server does not return them; VLLMScorer does, with an engine of this process",
            pooler=pooler,
            already_calibrated=pooler.logit_mean is not None or pooler.logit_sigma is not None,
        )
        return Served(info=info, batch=BATCH, refuses=REFUSES + (("item_first", "alone") if pairs else ()), proof=proof)

    def calls(self, request: HTTPRequest, served: Served, span: range) -> list[Call]:
        """One call; a judge's needs one a label, since the server returns the first label's probability only."""
        task, info = request.params.task, served.info
        if task == "generative":
            return [
                Call(path="/generative_scoring", body=_judge(request, info, span, k))
                for k in range(len(request.labels[span[0]]))
            ]
        common: dict[str, Any] = {"model": info.id, "use_activation": False}
        if request.params.truncate_prompt_tokens is not None and request.sequences is None:
            common["truncate_prompt_tokens"] = request.params.truncate_prompt_tokens
        if not info.causal:
            items = [request.items[i] for i in span]
            return [Call(path="/score", body={**common, "queries": request.query, "documents": items})]
        inputs = [request.ids(i) if request.ids(i) is not None else request.text(i) for i in span]
        return [Call(path="/pooling", body={**common, "task": task, "input": inputs})]

    def answers(self, request: HTTPRequest, served: Served, span: range, bodies: Sequence[Json]) -> list[Answer]:
        """In the order of the entries' indices."""
        if request.params.task == "generative":
            columns = [in_order(entries(body, "data"), span, "score") for body in bodies]
            rows = [[column[at] for column in columns] for at in range(len(span))]
            return [
                answer(None if None in row else row, request, i, shape=(-1,), probabilities=True)
                for i, row in zip(span, rows, strict=True)
            ]
        values = in_order(entries(bodies[0], "data"), span, "data" if served.info.causal else "score")
        found = [
            answer(value, request, i, shape=SHAPES[request.params.chosen])
            for value, i in zip(values, span, strict=True)
        ]
        return [_uncalibrated(one, served.info.pooler) for one in found]


def _what_it_does(ask: Ask, model: Any, pairs: bool) -> tuple[Task, int, Activation]:
    """(task, labels or embedding size, what use_activation=true applies), from two small requests."""
    if pairs:
        raw, activated = (_pair_scores(ask, model, flag) for flag in (False, True))
        return "classify", 1, activation_between(raw, activated)
    refusals = []
    for task in SHAPES:
        body = {"model": model, "task": task, "input": PROBE}
        try:
            raw, activated = (
                [numbers(v) for v in in_order(entries(ask(Call(path="/pooling", body=body | {"use_activation": flag})), "data"),
                                              range(len(PROBE)), "data")]
                for flag in (False, True)
            )  # fmt: skip
        except RequestFailed as error:
            if error.status not in (400, 404):
                raise
            refusals.append(f"{task}: {error}")
            continue
        activation = activation_between(raw, activated) if "classify" in task else "identity"
        if raw[0] is None:
            raise RequestFailed("the server answered a small test request with scores that are not numbers")
        return task, raw[0].shape[-1], activation
    body = {"model": model, "query": [1], "items": [[2]], "label_token_ids": [1, 2], "apply_softmax": False}
    try:
        entries(ask(Call(path="/generative_scoring", body=body)), "data")
    except RequestFailed as error:
        raise RequestFailed(f"the server neither pools ({'; '.join(refusals)}) nor judges ({error})") from error
    return "generative", 0, "identity"


def _pair_scores(ask: Ask, model: Any, activated: bool) -> list[np.ndarray | None]:
    body = {"model": model, "queries": "a", "documents": ["b", "c d"], "use_activation": activated}
    found = in_order(entries(ask(Call(path="/score", body=body)), "data"), range(2), "score")
    return [None if value is None else numbers([value]) for value in found]


def _pooler(ask: Ask) -> tuple[PoolerDefaults, str]:
    """(PoolerConfig, how it is known), from the development endpoint; nothing where the server has none."""
    try:
        served = ask(Call(path="/server_info?config_format=json"))
        stated = served["vllm_config"]["model_config"]["pooler_config"]  # type: ignore[index]
    except (RequestFailed, KeyError, TypeError):
        return PoolerDefaults(), ""
    if not isinstance(stated, dict):  # a generating server has none
        return PoolerDefaults(), "/server_info"
    known_fields = {
        "pooling": "seq_pooling_type",
        "token_pooling": "tok_pooling_type",
        "logit_mean": "logit_mean",
        "logit_sigma": "logit_sigma",
        "use_activation": "use_activation",
        "step_tag_id": "step_tag_id",
    }
    return PoolerDefaults(**{ours: stated.get(theirs) for ours, theirs in known_fields.items()}), "/server_info"


def _uncalibrated(found: Answer, pooler: PoolerDefaults) -> Answer:
    if found.values is None or (pooler.logit_mean is None and pooler.logit_sigma is None):
        return found
    values = found.values.astype(np.float64) * (pooler.logit_sigma or 1.0) + (pooler.logit_mean or 0.0)
    return Answer(values=values.astype(np.float32), prompt_tokens=found.prompt_tokens, truncated=found.truncated)


def _judge(request: HTTPRequest, info: ModelInfo, span: range, first: int) -> dict[str, Any]:
    """A request whose first label is number `first`: the only one whose probability comes back."""
    labels = request.labels[span[0]]
    return {
        "model": info.id,
        "query": [],
        "items": [request.ids(i) for i in span],
        "label_token_ids": [*labels[first:], *labels[:first]],
        "apply_softmax": False,
    }


OURS = "rlalign"  # owned_by in /v1/models
SGLANG_REFUSES = (
    "step_tag_id", "returned_token_ids", "skip_reading_prefix_cache", "truncate_prompt_tokens", "max_tokens_per_item",
)  # fmt: skip
OURS_REFUSES = ("skip_reading_prefix_cache",)


class SGLangDialect(Dialect):
    """SGLang's server, and ours."""

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
            cuts = ("truncate_prompt_tokens", "truncation_side", "max_tokens_per_item")
            names = ("step_tag_id", "returned_token_ids", *(cuts if request.sequences is None else ()))
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
