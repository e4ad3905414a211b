"""What the dialects share: strict pydantic models, results as JSON values, and the one shape of every error."""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from rlalign.scoring.params import ScoringParams

if TYPE_CHECKING:
    from rlalign.scoring.result import ScoreResult

log = logging.getLogger("rlalign.server")
BRANCHES = ("str", "int", "float", "bool", "dict")  # of a union, beside names such as list[int]
TYPES = {404: "not_found", 405: "method_not_allowed"}


class ErrorInfo(BaseModel):
    """type: stable, for programs; param: the field at fault; code: the HTTP status."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(BaseModel):
    error: ErrorInfo


class ApiError(HTTPException):
    """An answer other than 200. A subclass of HTTPException because FastAPI passes those through untouched."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers=headers)
        self.type = type
        self.param = param


def invalid(message: str, param: str | None = None) -> ApiError:
    """400: the request says something that cannot be done."""
    return ApiError(400, message, type="invalid_request", param=param)


def internal(request_id: str) -> ApiError:
    """500: what went wrong stays in the log."""
    said = f"internal error; the server's log has it under {request_id}"
    return ApiError(500, said, type="internal_error")


def response(error: HTTPException) -> JSONResponse:
    """The answer that an error stands for."""
    status = error.status_code
    info = ErrorInfo(
        message=printable(str(error.detail)),
        type=error.type if isinstance(error, ApiError) else TYPES.get(status, "invalid_request"),
        param=error.param if isinstance(error, ApiError) else None,
        code=status,
    )
    return JSONResponse({"error": info.model_dump()}, status_code=status, headers=error.headers)


def printable(text: str, limit: int = 2000) -> str:
    """Text that UTF-8 can carry: a client's lone surrogates are spelled out; long messages are cut."""
    clean = text.encode("utf-8", "backslashreplace").decode()
    return clean if len(clean) <= limit else f"{clean[:limit]}..."


def add_handlers(app: FastAPI) -> None:
    """Give the application's errors this shape. What nobody expected is `internal`, and comes from the guard."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        if not isinstance(error, ApiError) and error.status_code in (404, 405):
            what = "no such path" if error.status_code == 404 else "this path has other methods"
            said = f"{request.method} {request.url.path}: {what}; /docs lists what there is"
            # all of them: Starlette names those of the first route with this path only
            methods = sorted(method.upper() for method in app.openapi()["paths"].get(request.url.path, {"get": None}))
            headers = {"Allow": ", ".join(methods)} if error.status_code == 405 else None
            error = HTTPException(error.status_code, said, headers=headers)
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method in ("POST", "PUT") and kind != "application/json" and not kind.endswith("+json"):
            said = f"the body must be JSON; send Content-Type: application/json, got {kind or 'none'!r}"
            return response(ApiError(415, said, type="unsupported_media_type"))
        return response(_first(error))


def _first(error: RequestValidationError) -> ApiError:
    """The complaint that went deepest into the body: of a union's branches, the one that the client most likely meant."""
    found = error.errors()
    best = max(found, key=lambda e: (len(e["loc"]), -found.index(e)))
    if best["type"] == "json_invalid":
        return invalid(f"the body is not JSON: {best.get('ctx', {}).get('error', best['msg'])}")
    where = map(
        str, best["loc"][1:]
    )  # the first part says that it was the body; pydantic puts in names of a union's branches
    path = ".".join(part for part in where if "[" not in part and part not in BRANCHES) or None
    message = "unknown field; see /docs" if best["type"] == "extra_forbidden" else best["msg"]
    return invalid(f"{path}: {message}" if path else message, path)


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

ERRORS: dict[int | str, dict[str, Any]] = {
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


def with_params(defaults: ScoringParams, given: dict[str, Any]) -> ScoringParams:
    """The server's defaults, with the fields that a request gives in their place. Raises ApiError 400."""
    chosen = {name: value for name, value in given.items() if value is not None}
    try:
        return msgspec.structs.replace(defaults, **chosen)
    except (ValueError, TypeError) as error:
        raise invalid(str(error)) from error


def refuse(given: dict[str, Any], why: str) -> None:
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
    arrays = [None if s is None else np.asarray(s.float(), dtype="<f4") for s in result.pooled_hidden_states]
    if encoding == "float":
        return [None if array is None else array.tolist() for array in arrays]
    return [None if array is None else base64.b64encode(array.tobytes()).decode() for array in arrays]
