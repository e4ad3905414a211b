"""Inside a vLLM server's process: a key in front of all its routes, and an end with whoever started it. Imports little."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable, MutableMapping

KEY_VARIABLE = "RLALIGN_ROLLOUT_KEY"
OPEN = ("/health",)  # for probes that know no key
LOOPBACK = ("127.0.0.1", "localhost", "::1")
CLASS = f"{__name__}.KeyGuard"  # for vLLM's --middleware

Message = MutableMapping[str, object]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
PR_SET_PDEATHSIG = 1  # linux/prctl.h; survives exec


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


def tether() -> None:
    """`python -m rlalign.rollout.server.process_guard PARENT COMMAND ...`: become COMMAND, and get SIGTERM when PARENT dies."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent or parent != int(sys.argv[1]):  # it died before we were tied to it
        sys.exit(1)
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    tether()
