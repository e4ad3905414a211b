"""POST /get_reward: OpenRLHF's remote reward model. `query` holds whole sequences, prompt and response in the chat template.

Each is scored as it is sent, without special tokens of the tokenizer; OpenRLHF's own server would strip padding and put one EOS
at the end, so send it with its EOS.
rewards are raw logits, or calibrated probabilities where a calibration is in force.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse

from rlalign.serve.bodies import ERRORS, Body, Str, one_number
from rlalign.serve.errors import invalid
from rlalign.serve.finish import single_logits
from rlalign.serve.service import Ask, Service


class RewardBody(Body):
    """prompts and labels are what OpenRLHF sends beside; a reward model needs neither."""

    query: list[Str]
    prompts: list[Str] | None = None
    labels: list[object] | None = None


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


def router(service: Service) -> APIRouter:
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
