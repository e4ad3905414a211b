"""Puts the parts together into one ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.middleware import Middleware

from rlalign.serve import bodies, sglang, status, vllm
from rlalign.serve.batcher import Batcher, ServerMetrics
from rlalign.serve.calibrations import Calibrations
from rlalign.serve.guard import Guard
from rlalign.serve.service import Service

if TYPE_CHECKING:
    from rlalign.calibration.calibrators.calibration_file import Json
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
    app.include_router(status.health_router(service))
    documented = [] if settings.api_key is None else [Depends(HTTPBearer(auto_error=False))]  # the guard checks it
    for paths in (sglang.router, vllm.router, sglang.reward_router, status.calibration_router, status.router):
        app.include_router(paths(service), dependencies=documented)
    return app
