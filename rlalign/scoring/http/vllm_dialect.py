"""vLLM's server: /pooling for its four pooling tasks, /score for a cross-encoder's pairs, /generative_scoring for judges.

Scores are asked for with use_activation=false, since vLLM's default is the activated score. PoolerConfig's logit_mean and
logit_sigma act on them all the same, and only the development endpoint /server_info shows whether they are set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from rlalign.scoring.http.dialect import (
    Ask,
    HTTPRequest,
    Served,
    activation_between,
    answer,
    behind,
    chosen_card,
    entries,
    in_order,
    numbers,
)
from rlalign.scoring.http.transport import Call, Json, RequestFailed
from rlalign.scoring.params import ModelInfo, PoolerDefaults, Task
from rlalign.scoring.result import Answer

if TYPE_CHECKING:
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


class VLLMDialect:
    """See the module."""

    name = "vllm"
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
    judge = Call(path="/generative_scoring", body=_judge_probe(model))
    try:
        entries(ask(judge), "data")
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
    """The logit before the server's mean and sigma."""
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


def _judge_probe(model: Any) -> dict[str, Any]:
    return {"model": model, "query": [1], "items": [[2]], "label_token_ids": [1, 2], "apply_softmax": False}
