"""One JSON exchange with a scoring server: what is retried, what is not, and a deadline over everything.

Retried: no connection, 429 and 5xx. Not retried: any other status, a broken or late answer (it may have been computed already;
the next server behind a balancer would not know). Blocking callers share one event loop, in a thread of the transport.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import httpx

FIRST_WAIT, LONGEST_WAIT = 0.25, 8.0  # seconds between attempts, doubled each time
IDLE = 2.0  # seconds an unused connection is kept: less than the 5 after which uvicorn closes it under a request
SHOWN = 300  # characters of a server's message that an error repeats

Json = dict[str, Any] | list[Any]
T = TypeVar("T")


class RequestFailed(RuntimeError):
    """The server gave no usable answer. status: of its last response, None where there was none."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP request. body None: GET."""

    path: str
    body: dict[str, Any] | None = None


class Transport:
    """Connections to one server. timeout: seconds that a call may take with all its retries; retries: after the first try.

    concurrency: connections at a time; further calls wait, and their waiting counts.
    """

    def __init__(self, base_url: str, *, api_key: str | None, timeout: float, retries: int, concurrency: int) -> None:
        import httpx

        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url: expected http:// or https://, got {base_url!r}")
        if not (math.isfinite(timeout) and timeout > 0):
            raise ValueError(f"timeout: expected a positive number of seconds, got {timeout!r}")
        if retries < 0:
            raise ValueError(f"retries: expected 0 or more, got {retries!r}")
        self.base_url, self.timeout, self.retries = base_url.rstrip("/"), timeout, retries
        self._headers = {"Content-Type": "application/json"}
        self._headers |= {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._limits = httpx.Limits(max_connections=concurrency, keepalive_expiry=IDLE)
        self._verify = self.base_url.startswith("https://")  # reading the certificates takes half a second
        self._here = threading.local()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rlalign-http", daemon=True)
        self._thread.start()

    def send(self, call: Call) -> Json:
        """The JSON of a 200 answer. Raises RequestFailed."""
        return self.wait(self.asend(call))

    def wait(self, work: Coroutine[None, None, T]) -> T:
        """Run a coroutine in the transport's own loop, whatever loop the caller is in, and block until it ends."""
        if self._loop.is_closed():
            work.close()
            raise RuntimeError(f"{self.base_url}: this client is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def asend(self, call: Call) -> Json:
        """`send` in the caller's event loop; cancelling it closes the connection."""
        deadline, failed, attempt = time.monotonic() + self.timeout, None, 0
        for attempt in range(self.retries + 1):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            reply = await self._reply(call, left)
            if isinstance(reply, RequestFailed):
                failed, retry_after = reply, None
            elif reply.status_code == 200:
                return _parsed(reply)
            else:
                failed, retry_after = _refused(reply), reply.headers.get("retry-after")
                if reply.status_code != 429 and reply.status_code < 500:
                    raise failed
            wait = _pause(attempt, retry_after)
            if attempt == self.retries or time.monotonic() + wait >= deadline:
                break
            await asyncio.sleep(wait)
        status = None if failed is None else failed.status
        tries = f"gave up after {attempt + 1} tries, deadline {self.timeout:g} s"
        raise RequestFailed(f"{failed or 'not sent'} ({tries})", status)

    def close(self) -> None:
        """Close the idle connections and end the thread. Safe to call twice."""
        if self._loop.is_closed():
            return
        self.wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await self._client().aclose()

    async def _reply(self, call: Call, seconds: float) -> httpx.Response | RequestFailed:
        """The response, or a failure that may be retried. httpx's timeouts start anew with every byte, so a deadline is over it."""
        import httpx

        content = None if call.body is None else json.dumps(call.body, allow_nan=False).encode()
        method = "GET" if call.body is None else "POST"
        try:
            async with asyncio.timeout(seconds):
                return await self._client().request(method, call.path, content=content, timeout=seconds)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return RequestFailed(f"no connection to the server: {error or type(error).__name__}")
        except (httpx.TimeoutException, TimeoutError) as error:
            raise RequestFailed(f"no answer within {self.timeout:g} s") from error
        except httpx.TransportError as error:
            raise RequestFailed(f"the connection broke: {error or type(error).__name__}") from error

    def _client(self) -> httpx.AsyncClient:
        """One client an event loop: connections cannot move between loops."""
        import httpx

        loop = asyncio.get_running_loop()
        if getattr(self._here, "loop", None) is not loop:
            self._here.loop = loop
            self._here.client = httpx.AsyncClient(
                base_url=self.base_url, headers=self._headers, limits=self._limits, verify=self._verify
            )
        return self._here.client


def _pause(attempt: int, retry_after: str | None) -> float:
    """Seconds to wait; what the server asks for, else doubling with up to a quarter of jitter."""
    if retry_after is not None and retry_after.isdigit():
        return float(retry_after)
    return min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.75, 1.0)


def _parsed(reply: httpx.Response) -> Json:
    try:
        parsed = json.loads(reply.content)
    except ValueError as error:
        raise RequestFailed(f"the answer is not JSON: {_shown(reply)!r}", reply.status_code) from error
    if not isinstance(parsed, dict | list):
        raise RequestFailed(f"the answer is {parsed!r}, not an object or a list", reply.status_code)
    return parsed


def _refused(reply: httpx.Response) -> RequestFailed:
    try:
        found = json.loads(reply.content)
    except ValueError:
        found = _shown(reply) or "no message"
    for key in ("error", "message", "detail"):
        while isinstance(found, dict) and key in found:
            found = found[key]
    return RequestFailed(f"HTTP {reply.status_code}: {str(found)[:SHOWN]}", reply.status_code)


def _shown(reply: httpx.Response) -> str:
    return reply.content[:SHOWN].decode(errors="replace")
