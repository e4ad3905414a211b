"""A key in front of all of vLLM's routes. Its own --api-key leaves the development routes open, which can run code."""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping

KEY_VARIABLE = "RLALIGN_ROLLOUT_KEY"
OPEN = ("/health",)  # for probes that know no key
LOOPBACK = ("127.0.0.1", "localhost", "::1")
CLASS = f"{__name__}.KeyGuard"  # for vLLM's --middleware

Message = MutableMapping[str, object]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class KeyGuard:
    """ASGI middleware: 401 without `Authorization: Bearer KEY`, the key being the server's RLALIGN_ROLLOUT_KEY."""

    def __init__(self, app: App) -> None:
        """Raises RuntimeError without a key: a guard that lets everybody in would only look like one."""
        self._app = app
        key = os.environ.get(KEY_VARIABLE, "")
        if not key:
            raise RuntimeError(f"{CLASS} needs {KEY_VARIABLE} in the server's environment")
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") in OPEN or self._knows(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "missing or wrong key"}'})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _knows(self, scope: Message) -> bool:
        given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        return len(given) == 1 and secrets.compare_digest(given[0], self._expected)
