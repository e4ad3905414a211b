"""A reward model behind HTTP: the shapes of SGLang, vLLM and OpenRLHF, calibrated, batched, and never a wrong number.

    app = create_app(HFScorer("my/reward-model"), ServerSettings())      # or: rlalign serve my/reward-model

A request passes `guard` (key, size, deadline), a dialect (`sglang` with OpenRLHF's path, `vllm`: pydantic models and conversion),
`service` (limits, calibration, post-processing) and `batcher` (one queue, one worker thread, one `scorer.run` at a time).
`calibrations` holds the one calibration in force and watches its drift; `bodies` has the only shape that errors have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlalign.serve.settings import ServerSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from rlalign.calibration.calibrators.calibration_file import Json
    from rlalign.scoring.scorer import RewardScorer

__all__ = ["ServerSettings", "create_app"]


def create_app(scorer: RewardScorer, settings: ServerSettings, calibration: Json | None = None) -> FastAPI:
    """The ASGI application over `scorer`; see `app.create_app`."""
    from rlalign.serve import app

    return app.create_app(scorer, settings, calibration)
