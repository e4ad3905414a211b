"""POST /v1/score, SGLang's request and response with calibration and reasons, and POST /get_reward, OpenRLHF's.

As in SGLang: a classifier's scores are raw logits, a causal LM's are the labels' probabilities (over the whole vocabulary, or
with apply_softmax among the labels), label_token_ids on a classifier have no effect, and `model` is not looked at; the answer
names the model that scored. Different: hidden states are never silently absent, one label under a softmax is refused, and
unknown fields are errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from rlalign.serve.bodies import (
    ERRORS,
    Body,
    Flag,
    Row,
    Str,
    Text,
    TokenId,
    Usage,
    Whole,
    invalid,
    one_number,
    refuse,
    row,
    states,
    usage,
    with_params,
)
from rlalign.serve.service import SCORED_TASKS, Ask, Scored, Service, single_logits

UNSUPPORTED = "not supported here: items are scored one by one, without setwise extraction or embedding overrides"


class ScoreBody(Body):
    """query and items are all text or all token ids. Fields after `model` are ours; null leaves them to the server."""

    query: Text | None = None
    items: Str | list[Text] | None = None
    label_token_ids: list[TokenId] | list[list[TokenId]] | None = None
    apply_softmax: Flag = False
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)] = 1.0
    return_token_logprobs: Flag = False
    item_first: Flag = False
    return_pooled_hidden_states: Flag = False
    score_extraction_token: Str | None = None
    embed_override_token_id: TokenId | None = None
    query_embed_overrides: list[Any] | None = None
    item_embed_overrides: list[Any] | None = None
    model: Str = "default"

    calibrate: Flag | None = Field(
        None, description="calibrated probabilities; null: whenever a calibration is in force"
    )
    encoding_format: Literal["float", "base64"] = Field("float", description="of hidden states; base64: float32")
    use_activation: Flag | None = Field(None, description="the model's own sigmoid or softmax")
    task: Str | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1, strict=True)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    max_tokens_per_item: Whole | None = None
    alone: Flag = Field(False, description="a cross-encoder reads each item as one text; only with an empty query")
    min_label_mass: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)] | None = None
    step_tag_id: TokenId | None = None
    returned_token_ids: list[TokenId] | None = None
    policy_version: Whole | None = Field(None, description="of the policy that wrote the items; for the drift report")


class ScoreAnswer(BaseModel):
    """Lists have one entry an item; a failed item is null in all of them but `errors`, which has the reason.

    One error leaves the score in place, low_label_mass: look at it, but do not use it as a reward.
    """

    id: str
    object: Literal["scoring"] = "scoring"
    model: str
    scores: list[Row]
    logits: list[Row]
    pooled_hidden_states: list[list[float] | str | None] | None
    token_logprobs: list[Row] | None
    label_mass: list[float | None] | None
    errors: list[str | None]
    calibration_id: str
    usage: Usage


def router(service: Service) -> APIRouter:
    """The path of this dialect."""
    paths = APIRouter(tags=["score"])

    @paths.post("/v1/score", response_model=ScoreAnswer, responses=ERRORS)
    async def score(body: ScoreBody, request: Request) -> JSONResponse:
        """Score items against a query."""
        request_id = f"score-{request.state.request_id}"
        scored = await service.score(ask(body, service), request_id)
        return JSONResponse(answer(body, scored, request_id, service.model_name).model_dump())

    return paths


def ask(body: ScoreBody, service: Service) -> Ask:
    """The request in our own words. Raises ApiError 400."""
    unsupported = ("score_extraction_token", "embed_override_token_id", "query_embed_overrides", "item_embed_overrides")
    refuse({name: getattr(body, name) for name in unsupported}, UNSUPPORTED)
    if body.query is None or body.items is None:
        name = "items" if body.items is None else "query"
        raise invalid(f"{name} must be provided", name)
    if body.temperature != 1.0 and not body.apply_softmax:
        raise invalid("temperature has an effect only with apply_softmax", "temperature")
    if sum(map(bool, (body.apply_softmax, body.use_activation, body.calibrate))) > 1:
        raise invalid("ask for one of apply_softmax, use_activation and calibrate: each makes the probabilities")
    items = [body.items] if isinstance(body.items, str) else body.items
    task = body.task or service.task
    if body.apply_softmax and task not in SCORED_TASKS:
        raise invalid(f"task {task!r} has no labels to share a softmax", "apply_softmax")
    calibration = service.calibration(False if body.apply_softmax or body.use_activation else body.calibrate, task)
    own = _judging(body, calibrated=calibration is not None) if task == "generative" else _classifying(body, service)
    return Ask(
        pairs=[(body.query, items)],
        params=with_params(service.params, _given(body) | own),
        calibration=calibration,
        softmax_temperature=body.temperature if body.apply_softmax and task != "generative" else None,
        policy_version=body.policy_version,
    )


def answer(body: ScoreBody, scored: Scored, request_id: str, model: str) -> ScoreAnswer:
    """The response to one request."""
    (result,) = scored.results
    return ScoreAnswer(
        id=request_id,
        model=model,
        scores=[row(entry) for entry in result.scores],
        logits=[row(entry) for entry in result.logits],
        pooled_hidden_states=states(result, body.encoding_format),
        token_logprobs=None if result.token_logprobs is None else [row(entry) for entry in result.token_logprobs],
        label_mass=result.label_mass,
        errors=result.errors,
        calibration_id=scored.calibration_id,
        usage=usage(scored.prompt_tokens),
    )


def _given(body: ScoreBody) -> dict[str, Any]:
    names = ("task", "truncate_prompt_tokens", "truncation_side", "max_tokens_per_item")
    return {name: getattr(body, name) for name in names} | {
        name: True
        for name in ("return_pooled_hidden_states", "return_token_logprobs", "item_first", "alone")
        if getattr(body, name)
    }


def _classifying(body: ScoreBody, service: Service) -> dict[str, Any]:
    if body.apply_softmax and service.scorer.info.num_labels == 1:
        raise invalid("the softmax of one label is always 1.0; ask for use_activation or calibrate", "apply_softmax")
    names = ("use_activation", "step_tag_id", "returned_token_ids", "min_label_mass")
    return {name: getattr(body, name) for name in names}


def _judging(body: ScoreBody, *, calibrated: bool) -> dict[str, Any]:
    absolute = not (body.apply_softmax or calibrated)
    mass = body.min_label_mass
    return {
        "label_token_ids": body.label_token_ids,
        "use_activation": body.use_activation,
        "temperature": body.temperature if body.apply_softmax else None,
        "full_vocabulary": absolute,
        # absolute probabilities say by themselves how little the labels hold; only renormalised ones can mislead
        "min_label_mass": 0.0 if absolute and mass is None else mass,
    }


class RewardBody(Body):
    """prompts and labels are what OpenRLHF sends beside; a reward model needs neither."""

    query: list[Str]
    prompts: list[Str] | None = None
    labels: list[Any] | None = None


class RewardAnswer(BaseModel):
    """One entry a query; null, with its reason in `errors`, for one that failed: OpenRLHF stops on it, as it should.

    scores: what OpenRLHF filters by; the same numbers. extra_logs: the raw logits (a judge's log-odds), for its logs.
    """

    rewards: list[float | None]
    scores: list[float | None]
    extra_logs: dict[str, list[float | None]]
    errors: list[str | None]
    model: str
    calibration_id: str


def reward_router(service: Service) -> APIRouter:
    """The path of this dialect."""
    paths = APIRouter(tags=["OpenRLHF"])

    @paths.post("/get_reward", response_model=RewardAnswer, responses=ERRORS)
    async def get_reward(body: RewardBody, request: Request) -> JSONResponse:
        """One reward a sequence."""
        service.require_one_number()
        for name in ("prompts", "labels"):
            given = getattr(body, name)
            if given is not None and len(given) != len(body.query):
                raise invalid(f"{name}: {len(given)} entries for {len(body.query)} queries", name)
        ask = Ask(
            pairs=[("", body.query)],
            params=service.params,
            calibration=service.calibration(None, service.task),
            whole=True,
        )
        scored = await service.score(ask, f"reward-{request.state.request_id}")
        (result,) = scored.results
        judge = scored.task == "generative"
        rows = [row[:1] if judge and row is not None else row for row in result.scores]
        rewards = [one_number(*pair) for pair in zip(rows, result.errors, strict=True)]
        logits = single_logits(result, generative=judge)
        answer = RewardAnswer(
            rewards=rewards,
            scores=rewards,
            extra_logs={"logits": logits},
            errors=result.errors,
            model=service.model_name,
            calibration_id=scored.calibration_id,
        )
        return JSONResponse(answer.model_dump())

    return paths
