"""POST /score, /classify and /rerank: vLLM's requests and responses.

As in vLLM, and unlike /v1/score, use_activation is true unless the request says false: a score is a probability. Where a
calibration is in force that probability is the calibrated one; with use_activation false it is the raw logit, never shifted.
A failed item has null in place of its number, and its reason in `error`.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal, cast

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from rlalign.scoring.scorer import Text as AnyText
from rlalign.scoring.scorer import is_one_text
from rlalign.serve.bodies import (
    ERRORS,
    Body,
    Flag,
    Str,
    Text,
    TokenId,
    Usage,
    Whole,
    invalid,
    one_number,
    refuse,
    usage,
    with_params,
)
from rlalign.serve.service import Ask, Scored, Service

Texts = Str | list[TokenId] | list[Text]  # one, or several
SPELLINGS = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))


class _Common(Body):
    """What the three requests share. user, request_id and cache_salt have no effect on a score."""

    model: Str | None = None
    user: Str | None = None
    request_id: Str | None = None
    cache_salt: Str | None = None
    use_activation: Flag | None = Field(None, description="null: true, as in vLLM")
    calibrate: Flag | None = Field(
        None, description="null: when a calibration is in force and use_activation is not false"
    )
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1, strict=True)] | None = None
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="which end truncate_prompt_tokens cuts; null: right, as in vLLM. Special tokens stay"
    )
    label_token_ids: list[TokenId] | None = Field(
        None, description="of a generative judge, the first one counts as yes"
    )


class _Pairs(_Common):
    max_tokens_per_doc: Whole = Field(0, description="0: no limit")
    max_tokens_per_query: Literal[0] = 0
    instruction: None = None
    chat_template_kwargs: None = None


class ScoreBody(_Pairs):
    """Two sides under one of four pairs of names; 1:1, 1:N or N:N."""

    priority: Literal[0] = 0
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None
    text_1: Texts | None = None
    text_2: Texts | None = None


class Document(BaseModel):
    """Cohere's v1 form of a text."""

    text: Str


class RerankBody(_Pairs):
    """priority has no effect: first come, first served. return_documents false: results without them."""

    query: Text
    documents: Texts | list[Str | Document]
    priority: Whole = 0
    return_documents: Flag | None = None
    top_n: Whole = Field(0, description="0: all")


class ClassifyBody(_Common):
    input: Texts
    priority: Literal[0] = 0
    add_special_tokens: Literal[True] = True


class _Answer(BaseModel):
    id: str
    model: str
    usage: Usage
    calibration_id: str


class ScoreData(BaseModel):
    index: int
    object: Literal["score"] = "score"
    score: float | None
    error: str | None = None


class ScoreAnswer(_Answer):
    object: Literal["list"] = "list"
    created: int
    data: list[ScoreData]


class ClassifyData(BaseModel):
    index: int
    label: str | None
    probs: list[float] | None
    num_classes: int
    error: str | None = None


class ClassifyAnswer(_Answer):
    object: Literal["list"] = "list"
    created: int
    data: list[ClassifyData]


class RerankDocument(BaseModel):
    text: str | None
    multi_modal: None = None


class RerankResult(BaseModel):
    index: int
    document: RerankDocument | None
    relevance_score: float | None
    error: str | None = None


class RerankAnswer(_Answer):
    results: list[RerankResult]


def router(service: Service) -> APIRouter:
    """The paths of this dialect, each also under /v1 as older clients have it (except /v1/score, which is SGLang's)."""
    paths = APIRouter(tags=["vLLM"])

    @paths.post("/score", response_model=ScoreAnswer, responses=ERRORS)
    async def score(body: ScoreBody, request: Request) -> JSONResponse:
        """One score a pair."""
        service.require_one_number()
        first, second = _sides(body)
        request_id = f"score-{request.state.request_id}"
        scored = await service.score(_ask(body, service, _pairs(first, second), body.max_tokens_per_doc), request_id)
        data = [ScoreData(index=i, score=number, error=error) for i, (number, error) in enumerate(_numbers(scored))]
        return _answered(ScoreAnswer, scored, request_id, service, created=int(time.time()), data=data)

    @paths.post("/rerank", response_model=RerankAnswer, responses=ERRORS)
    @paths.post("/v1/rerank", response_model=RerankAnswer, responses=ERRORS)
    @paths.post("/v2/rerank", response_model=RerankAnswer, responses=ERRORS)
    async def rerank(body: RerankBody, request: Request) -> JSONResponse:
        """Documents by falling relevance; failed ones come last."""
        service.require_one_number()
        texts = body.documents
        if isinstance(texts, list):
            texts = cast("Texts", [one.text if isinstance(one, Document) else one for one in texts])
        documents = _listed(texts)
        request_id = f"rerank-{request.state.request_id}"
        scored = await service.score(
            _ask(body, service, [(body.query, documents)], body.max_tokens_per_doc), request_id
        )
        results = [
            RerankResult(
                index=i,
                document=None
                if body.return_documents is False
                else RerankDocument(text=text if isinstance(text := documents[i], str) else None),
                relevance_score=number,
                error=error,
            )
            for i, (number, error) in enumerate(_numbers(scored))
        ]
        logits = scored.results[0].logits  # of two equal probabilities the higher logit comes first

        def rank(one: RerankResult) -> tuple[bool, float, float]:
            row = logits[one.index]
            return one.relevance_score is not None, one.relevance_score or 0.0, 0.0 if row is None else float(row[0])

        results.sort(key=rank, reverse=True)
        return _answered(RerankAnswer, scored, request_id, service, results=results[: body.top_n or None])

    @paths.post("/classify", response_model=ClassifyAnswer, responses=ERRORS)
    @paths.post("/v1/classify", response_model=ClassifyAnswer, responses=ERRORS)
    async def classify(body: ClassifyBody, request: Request) -> JSONResponse:
        """The distribution over a model's labels, one text at a time."""
        items = _listed(body.input)
        query = "" if not items or isinstance(items[0], str) else []
        request_id = f"classify-{request.state.request_id}"
        scored = await service.score(_ask(body, service, [(query, items)], 0, alone=True), request_id)
        data = _classes(scored, service.scorer.info.labels)
        return _answered(ClassifyAnswer, scored, request_id, service, created=int(time.time()), data=data)

    return paths


def _sides(body: ScoreBody) -> tuple[Texts, Texts]:
    given = {name for pair in SPELLINGS for name in pair if getattr(body, name) is not None}
    for first, second in SPELLINGS:
        if given == {first, second}:
            return getattr(body, first), getattr(body, second)
    spellings = ", ".join("/".join(pair) for pair in SPELLINGS)
    raise invalid(f"give exactly one of {spellings}; got {', '.join(sorted(given)) or 'none of them'}")


def _pairs(first: Texts, second: Texts) -> list[tuple[AnyText, list[AnyText]]]:
    """1:1 and 1:N are one query with its items; N:N are N queries with one item each."""
    queries, items = _listed(first), _listed(second)
    if not queries or not items:
        raise invalid("at least one text is needed on each side")
    if len(queries) == 1:
        return [(queries[0], items)]
    if len(queries) != len(items):
        raise invalid(f"Input lengths must be either 1:1, 1:N or N:N; got {len(queries)}:{len(items)}")
    return [(query, [item]) for query, item in zip(queries, items, strict=True)]


def _listed(texts: Texts) -> list[AnyText]:
    return [texts] if is_one_text(texts) else list(cast("list[Text]", texts))


def _ask(
    body: _Common, service: Service, pairs: list[tuple[AnyText, list[AnyText]]], item_limit: int, *, alone: bool = False
) -> Ask:
    if body.use_activation is False and body.calibrate:
        raise invalid("calibrate makes probabilities and use_activation=false asks for logits", "calibrate")
    if service.task not in ("classify", "generative"):
        raise invalid(f"this model's task is {service.task!r}: it has no score an item; use /v1/score")
    calibration = service.calibration(False if body.use_activation is False else body.calibrate, service.task)
    given: dict[str, Any] = {
        "truncate_prompt_tokens": body.truncate_prompt_tokens,
        "max_tokens_per_item": item_limit or None,
    }
    if body.truncate_prompt_tokens is not None or service.params.truncate_prompt_tokens is not None:
        given["truncation_side"] = body.truncation_side or "right"
    if service.task == "generative":
        if body.use_activation is False:
            raise invalid(
                "a judge's score is a probability; /v1/score also gives the labels' log-probabilities", "use_activation"
            )
        given["label_token_ids"] = body.label_token_ids
    else:
        refuse({"label_token_ids": body.label_token_ids}, "this model is not a generative judge")
        given["alone"] = alone or None
        given["use_activation"] = body.use_activation is not False and calibration is None
    params = with_params(service.params, given)
    return Ask(pairs=pairs, params=params, model=body.model, calibration=calibration)


def _numbers(scored: Scored) -> list[tuple[float | None, str | None]]:
    """(score, error) of every item; a judge's score is that of its first label."""
    found = []
    for result in scored.results:
        for values, error in zip(result.scores, result.errors, strict=True):
            first = values[:1] if values is not None and scored.task == "generative" else values
            found.append((one_number(first, error), error))
    return found


def _classes(scored: Scored, labels: tuple[str, ...]) -> list[ClassifyData]:
    """One entry a text. label: the name of the most probable class; None for a single logit, which has no rival."""
    (result,) = scored.results
    found = []
    for i, (values, error) in enumerate(zip(result.scores, result.errors, strict=True)):
        values = values if error is None else None
        label = None
        if values is not None and len(values) > 1:
            logits = result.logits[i]
            top = int(
                np.lexsort((values if logits is None else logits, values))[-1]
            )  # of two equal probabilities the higher logit
            label = labels[top] if labels else f"LABEL_{top}"
        found.append(
            ClassifyData(
                index=i,
                label=label,
                probs=None if values is None else values.tolist(),
                num_classes=0 if values is None else len(values),
                error=error,
            )
        )
    return found


def _answered(kind: type[_Answer], scored: Scored, request_id: str, service: Service, **fields: Any) -> JSONResponse:
    answer = kind(
        id=request_id,
        model=service.model_name,
        usage=usage(scored.prompt_tokens),
        calibration_id=scored.calibration_id,
        **fields,
    )
    return JSONResponse(answer.model_dump())
