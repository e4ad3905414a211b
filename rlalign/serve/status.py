"""GET /v1/models, /health and /metrics."""

from __future__ import annotations

import time
from typing import Literal

import msgspec
from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from rlalign.serve.bodies import ERRORS
from rlalign.serve.service import Service


class ModelCard(BaseModel):
    """info: everything a client needs to know before it trusts a score, such as the head's dtype and who calibrates."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["rlalign"] = "rlalign"
    root: str
    max_model_len: int | None
    calibration_id: str
    info: dict[str, object]


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
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

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
