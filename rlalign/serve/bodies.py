"""What the dialects share: strict pydantic models, token ids that are not booleans, and results as JSON values."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from rlalign.scoring.params import ScoringParams
from rlalign.serve.errors import ErrorBody, invalid

if TYPE_CHECKING:
    from torch import Tensor

    from rlalign.scoring.result import ScoreResult


def _is_text(value: str) -> str:
    """JSON can spell half a character (a lone surrogate); no tokeniser and no answer can."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not text: a lone surrogate at character {error.start}") from error
    return value


Str = Annotated[StrictStr, AfterValidator(_is_text)]
TokenId = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]
Whole = Annotated[StrictInt, Field(ge=0, le=2**63 - 1)]
Text = Str | list[TokenId]
Flag = StrictBool
Row = list[float] | list[list[float]] | None  # [K] of an item, [T, K] for token tasks, null without one

ERRORS = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "the request cannot be answered as it stands",
        401: "the API key is missing or wrong",
        404: "no such model or path",
        405: "the path has other methods",
        409: "the calibration and the model do not fit",
        413: "too many items or bytes",
        415: "the body is not application/json",
        429: "the queue is full; Retry-After says when to come back",
        500: "an error of the server, with a number under which its log has it",
        503: "starting or draining",
        504: "the deadline passed",
    }.items()
}


class Body(BaseModel):
    """A request. Unknown fields are refused: a misspelt option would silently change the numbers."""

    model_config = ConfigDict(extra="forbid")


class Usage(BaseModel):
    """Tokens of the request. Nothing is generated, so completion_tokens is 0."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None
    reasoning_tokens: int = 0


def usage(tokens: int) -> Usage:
    """All of them were read."""
    return Usage(prompt_tokens=tokens, total_tokens=tokens)


def with_params(defaults: ScoringParams, given: dict[str, object]) -> ScoringParams:
    """The server's defaults, with the fields that a request gives in their place. Raises ApiError 400."""
    chosen = {name: value for name, value in given.items() if value is not None}
    try:
        return msgspec.structs.replace(defaults, **chosen)
    except (ValueError, TypeError) as error:
        raise invalid(str(error)) from error


def refuse(given: dict[str, object], why: str) -> None:
    """Raise ApiError 400 for the first field that was given and that this server cannot honour."""
    for name, value in given.items():
        if value is not None:
            raise invalid(f"{name}: {why}", name)


def row(values: np.ndarray | None) -> Row:
    """One item's numbers as JSON lists."""
    return None if values is None else values.tolist()


def one_number(values: np.ndarray | None, error: str | None) -> float | None:
    """The single score of an item; None for one with an error, also where a score stands beside it (low_label_mass)."""
    if values is None or error is not None:
        return None
    if values.shape != (1,):
        raise RuntimeError(f"expected one score an item, got shape {values.shape}")
    return float(values[0])


def states(result: ScoreResult, encoding: Literal["float", "base64"]) -> list[list[float] | str | None] | None:
    """Pooled hidden states: lists, or base64 of little-endian float32."""
    if result.pooled_hidden_states is None:
        return None
    return [None if state is None else _state(state, encoding) for state in result.pooled_hidden_states]


def _state(state: Tensor, encoding: str) -> list[float] | str:
    array = np.asarray(state.float(), dtype="<f4")
    return array.tolist() if encoding == "float" else base64.b64encode(array.tobytes()).decode()
