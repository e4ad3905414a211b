"""What every request passes before the application sees it: id, key, size, deadline; and what ends it when its client leaves."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from rlalign.serve.bodies import ApiError, internal, response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from rlalign.serve.batcher import ServerMetrics
    from rlalign.serve.settings import ServerSettings

log = logging.getLogger("rlalign.server")
UNANSWERED = 499  # what nginx calls a client that left; only the metrics ever see it
KEYLESS_PATHS = ("/health", "/docs", "/openapi.json")
WITH_BODY = ("POST", "PUT", "PATCH")


class Guard:
    """ASGI middleware. busy: makes the 429 of a server that holds `settings.max_requests` requests with bodies.

    A body is read whole, up to `settings.max_body_bytes`, before the application starts, so that slow and oversized uploads
    cost nothing else, and the connection can be watched for its client's leaving afterwards.
    """

    def __init__(
        self, app: ASGIApp, *, settings: ServerSettings, metrics: ServerMetrics, busy: Callable[[str], ApiError]
    ) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._busy = busy
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = scope.setdefault("state", {})["request_id"] = uuid.uuid4().hex
        status = UNANSWERED

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            async with asyncio.timeout(self._settings.request_timeout_s):
                await self._admit(scope, receive, named)
        except ApiError as error:
            await response(error)(scope, receive, named)
        except TimeoutError:
            if status == UNANSWERED:
                seconds = self._settings.request_timeout_s
                late = ApiError(504, f"no answer within {seconds:g} s; the request was given up", type="timeout")
                await response(late)(scope, receive, named)
        except asyncio.CancelledError:  # by uvicorn, when the drain is over; the task ends here anyway
            if status == UNANSWERED:
                said = "the server is ending and cannot answer any more; ask another one"
                await response(ApiError(503, said, type="shutting_down"))(scope, receive, named)
        except Exception:
            log.exception("request %s failed", request_id)
            if status == UNANSWERED:
                await response(internal(request_id))(scope, receive, named)
        finally:
            route = scope.get("route")
            path = "unmatched" if route is None else route.path  # the template, never what the client wrote
            self._metrics.requests.labels(path=path, status=str(status)).inc()
            self._metrics.seconds.labels(path=path).observe(time.perf_counter() - started)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if scope["path"] not in KEYLESS_PATHS:
            self._check_key(headers.get(b"authorization", b""))
        if scope["method"] not in WITH_BODY:
            await self._app(scope, receive, send)
            return
        if self._held >= self._settings.max_requests:
            raise self._busy(f"{self._held} requests wait already")
        self._held += 1
        try:
            body = await self._body(headers.get(b"content-length"), receive)
            if body is not None:
                await self._while_connected(scope, body, receive, send)
        finally:
            self._held -= 1

    def _check_key(self, given: bytes) -> None:
        key = self._settings.api_key
        kind, _, value = given.partition(b" ")
        if key is not None and not (kind.lower() == b"bearer" and hmac.compare_digest(value.strip(), key.encode())):
            raise ApiError(
                401,
                "send the API key as Authorization: Bearer KEY",
                type="unauthorized",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, announced: bytes | None, receive: Receive) -> bytes | None:
        """The whole body; None when the client leaves in the middle of it. Raises 413."""
        limit = self._settings.max_body_bytes
        parts: list[bytes] = []
        size = int(announced) if announced is not None and announced.isdigit() else 0
        got, more = 0, size <= limit
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            got += len(parts[-1])
            size = max(size, got)
            more = message.get("more_body", False) and size <= limit
        if size > limit:
            raise ApiError(
                413,
                f"the body has more than {limit} bytes; send fewer items at a time",
                type="too_large",
                headers={"Connection": "close"},
            )
        return b"".join(parts)

    async def _while_connected(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(receive())  # with the body read, the next message is that the client has left
        unread = [body]

        async def replay() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await asyncio.shield(gone)

        work = asyncio.ensure_future(self._app(scope, replay, send))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
