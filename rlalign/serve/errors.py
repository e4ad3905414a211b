"""Errors as clients see them: {"error": {message, type, param, code}}, whatever went wrong and wherever it did."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

log = logging.getLogger("rlalign.server")
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
            headers = {"Allow": _methods(app, request.url.path)} if error.status_code == 405 else None
            error = HTTPException(error.status_code, said, headers=headers)
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method in ("POST", "PUT") and kind != "application/json" and not kind.endswith("+json"):
            said = f"the body must be JSON; send Content-Type: application/json, got {kind or 'none'!r}"
            return response(ApiError(415, said, type="unsupported_media_type"))
        return response(_first(error))


def _methods(app: FastAPI, path: str) -> str:
    """All of them: Starlette names those of the first route with this path only."""
    return ", ".join(sorted(method.upper() for method in app.openapi()["paths"].get(path, {"get": None})))


def _first(error: RequestValidationError) -> ApiError:
    """The complaint that went deepest into the body: of a union's branches, the one that the client most likely meant."""
    found = error.errors()
    best = max(found, key=lambda e: (len(e["loc"]), -found.index(e)))
    if best["type"] == "json_invalid":
        return invalid(f"the body is not JSON: {best.get('ctx', {}).get('error', best['msg'])}")
    where = map(str, best["loc"][1:])  # the first part says that it was the body
    path = ".".join(part for part in where if not _names_a_branch(part)) or None
    message = "unknown field; see /docs" if best["type"] == "extra_forbidden" else best["msg"]
    return invalid(f"{path}: {message}" if path else message, path)


def _names_a_branch(part: str) -> bool:
    """pydantic puts names such as list[int] or str into the location of a union's complaint."""
    return "[" in part or part in ("str", "int", "float", "bool", "dict")
