"""The ASGI application, and its paths that score nothing: models, health, metrics, calibration, labels, drift."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.security import HTTPBearer
from prometheus_client import generate_latest
from pydantic import BaseModel, Field, StrictInt, model_validator
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response

from rlalign.calibration.calibrators.calibration_file import Json
from rlalign.serve import bodies, sglang, vllm
from rlalign.serve.batcher import Batcher, ServerMetrics
from rlalign.serve.bodies import ERRORS, ApiError, Body, Str, Whole, invalid
from rlalign.serve.calibrations import Calibrations, InForce
from rlalign.serve.guard import Guard
from rlalign.serve.service import Service

if TYPE_CHECKING:
    from rlalign.scoring.scorer import RewardScorer
    from rlalign.serve.settings import ServerSettings


def create_app(scorer: RewardScorer, settings: ServerSettings, calibration: Json | None = None) -> FastAPI:
    """The application over `scorer`. calibration: a calibration file's content, as for PUT /v1/calibration.

    Works only inside its lifespan (a server, or a test client as a context manager), and in one process: the queue and the
    calibration live here. Raises ValueError on a scorer that calibrates by itself, and on a calibration that it does not fit.
    """
    if scorer.info.calibration_id is not None:
        raise ValueError(
            f"{scorer.info.id}: a calibrator is attached to the scorer ({scorer.info.calibration_id}); the server calibrates "
            "itself: pass the scorer without it and its calibration file to the server"
        )
    metrics = ServerMetrics()
    batcher = Batcher(
        scorer, metrics, max_batch_tokens=settings.max_batch_tokens, max_queued_tokens=settings.max_queued_tokens
    )
    calibrations = Calibrations(scorer.info, settings)
    if calibration is not None:
        calibrations.begin_with(calibration)
    service = Service(scorer, settings, batcher, calibrations, metrics)
    metrics.watch_queue(lambda: batcher.queued)
    metrics.calibration(calibrations.in_force.id)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        working = asyncio.create_task(batcher.run())
        try:
            yield
        finally:
            working.cancel()
            batcher.close()
            calibrations.close()

    app = FastAPI(
        title="rlalign serve",
        description="Scores of a reward model, raw or calibrated, in the shapes of SGLang, vLLM and OpenRLHF.",
        version="1",
        redoc_url=None,
        lifespan=lifespan,
        middleware=[Middleware(Guard, settings=settings, metrics=metrics, busy=batcher.full)],
    )
    app.state.service = service
    bodies.add_handlers(app)
    app.include_router(health_router(service))
    documented = [] if settings.api_key is None else [Depends(HTTPBearer(auto_error=False))]  # the guard checks it
    for paths in (sglang.router, vllm.router, sglang.reward_router, calibration_router, router):
        app.include_router(paths(service), dependencies=documented)
    return app


class ModelCard(BaseModel):
    """info: everything a client needs to know before it trusts a score, such as the head's dtype and who calibrates."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["rlalign"] = "rlalign"
    root: str
    max_model_len: int | None
    calibration_id: str
    info: dict[str, Any]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """status: stuck (with 503) when one batch has run for longer than any request may take."""

    status: Literal["ok", "stuck"]
    queued_requests: int
    queued_tokens: int
    batch_seconds: float


def router(service: Service) -> APIRouter:
    """The paths that score nothing."""
    paths = APIRouter(tags=["status"])
    created = int(time.time())

    def card() -> ModelCard:
        info = service.scorer.info
        return ModelCard(
            id=service.model_name,
            created=created,
            root=info.id,
            max_model_len=info.max_length,
            calibration_id=service.calibrations.in_force.id,
            info=msgspec.to_builtins(info),
        )

    @paths.get("/v1/models", response_model=ModelList, responses=ERRORS)
    async def models() -> JSONResponse:
        """The one model behind this server."""
        return JSONResponse(ModelList(data=[card()]).model_dump())

    @paths.get("/v1/models/{model:path}", response_model=ModelCard, responses=ERRORS)
    async def model(model: str) -> JSONResponse:
        """The card of one model; 404 for every name but this one's."""
        service.require_model(model)
        return JSONResponse(card().model_dump())

    @paths.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, 401: ERRORS[401]})
    async def metrics() -> Response:
        """For Prometheus."""
        text = generate_latest(service.metrics.registry)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return paths


def health_router(service: Service) -> APIRouter:
    """The one path of the service that needs no key."""
    paths = APIRouter(tags=["status"])

    @paths.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> JSONResponse:
        """Open to everyone: for load balancers and probes."""
        since = service.batcher.busy_since
        seconds = 0.0 if since is None else time.monotonic() - since
        stuck = seconds > service.settings.request_timeout_s
        requests, tokens = service.batcher.queued
        health = Health(
            status="stuck" if stuck else "ok",
            queued_requests=requests,
            queued_tokens=tokens,
            batch_seconds=round(seconds, 3),
        )
        return JSONResponse(health.model_dump(), status_code=503 if stuck else 200)

    return paths


Finite = Annotated[float, Field(allow_inf_nan=False, strict=True)]


class CalibrationAnswer(BaseModel):
    """calibration: the document as it was put, null where scores are raw."""

    calibration_id: str
    calibration: Json | None


class Label(Body):
    """The verdict on one scored item: `id` (of a response, a slash and the item's index) or the `logit` the client kept.

    weight: one over the chance that this item was picked for labelling. policy_version: only beside a logit; a score under
    an id has its own.
    """

    id: Str | None = None
    logit: Finite | None = None
    label: Annotated[StrictInt, Field(ge=0, le=1)]
    weight: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False, strict=True)] = 1.0
    policy_version: Whole | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Label:
        if (self.id is None) == (self.logit is None):
            raise ValueError("give either id or logit")
        if self.id is not None and self.policy_version is not None:
            raise ValueError("policy_version belongs to the request that scored the item")
        return self


class LabelsBody(Body):
    labels: list[Label]


class LabelsAnswer(BaseModel):
    """accepted: new. duplicates: known with the same label, ignored. revised: known with another one, which now counts.

    unknown: ids that this server did not give, or has forgotten.
    """

    accepted: int
    duplicates: int
    revised: int
    unknown: list[str]


def calibration_router(service: Service) -> APIRouter:
    """The paths around the calibration."""
    paths = APIRouter(tags=["calibration"])

    @paths.get("/v1/calibration", response_model=CalibrationAnswer, responses=ERRORS)
    async def get_calibration() -> Response:
        """The calibration in force."""
        return _described(service.calibrations.in_force)

    @paths.put("/v1/calibration", response_model=CalibrationAnswer, responses=ERRORS)
    async def put_calibration(document: Json) -> Response:
        """Put a calibration file's content in force, for every request from now on. 409: it is for another model."""
        in_force = await service.calibrations.replace(document)
        service.metrics.calibration(in_force.id)
        return _described(in_force)

    @paths.post("/v1/labels", response_model=LabelsAnswer, responses=ERRORS)
    async def post_labels(body: LabelsBody, request: Request) -> JSONResponse:
        """What a verifier or a person said of scored items."""
        answer = await _label(service, body.labels)
        for outcome in ("accepted", "duplicates", "revised"):
            service.metrics.labels.labels(outcome=outcome).inc(getattr(answer, outcome))
        service.metrics.labels.labels(outcome="unknown").inc(len(answer.unknown))
        return JSONResponse(answer.model_dump())

    @paths.get("/v1/calibration/drift", response_model=Json, responses=ERRORS)
    async def get_drift() -> JSONResponse:
        """Whether calibrated scores still agree with the labels: ok, warn, drift or insufficient_data, with the numbers."""
        return JSONResponse((await service.calibrations.drift()).as_json())

    return paths


def _described(in_force: InForce) -> Response:
    """ASCII, since a document is echoed as it came and may hold what UTF-8 cannot carry."""
    content = {"calibration_id": in_force.id, "calibration": in_force.document}
    return Response(json.dumps(content, allow_nan=False), media_type="application/json")


async def _label(service: Service, labels: list[Label]) -> LabelsAnswer:
    if len(labels) > service.settings.max_items:
        said = f"{len(labels)} labels, at most {service.settings.max_items} a request"
        raise ApiError(413, said, type="too_large", param="labels")
    named = [(one.id, one) for one in labels if one.id is not None]
    plain = [(one.logit, one) for one in labels if one.logit is not None]
    versions = [one.policy_version for _, one in plain if one.policy_version is not None]
    if 0 < len(versions) < len(plain):
        raise invalid("policy_version: give it beside every logit of a request, or beside none", "labels")
    outcomes = []
    if named or not plain:
        ids, verdicts = [id for id, _ in named], [one.label for _, one in named]
        outcomes.append(await service.calibrations.label(ids, verdicts, [one.weight for _, one in named]))
    if plain:
        logits, verdicts = [logit for logit, _ in plain], [one.label for _, one in plain]
        weights = [one.weight for _, one in plain]
        outcomes.append(await service.calibrations.label_logits(logits, verdicts, weights, versions or None))
    return LabelsAnswer(
        accepted=sum(each.accepted for each in outcomes),
        duplicates=sum(each.duplicates for each in outcomes),
        revised=sum(each.revised for each in outcomes),
        unknown=[str(unknown) for each in outcomes for unknown in each.unknown],
    )
