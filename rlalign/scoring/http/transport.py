"""One JSON exchange with a scoring server: what is retried, what is not, and a deadline over everything.

Retried: no connection, 429 and 5xx. Not retried: any other status, a broken or late answer (it may have been computed already;
the next server behind a balancer would not know). The retry loop does no I/O of its own, so it serves sync and async clients.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

FIRST_WAIT, LONGEST_WAIT = 0.25, 8.0  # seconds between attempts, doubled each time
IDLE = 2.0  # seconds an unused connection is kept: less than the 5 after which uvicorn closes it under a request
SHOWN = 300  # characters of a server's message that an error repeats

Json = dict[str, object] | list[object]


class RequestFailed(RuntimeError):
    """The server gave no usable answer. status: of its last response, None where there was none."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP request. body None: GET."""

    path: str
    body: dict[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Send:
    """Ask the driver to send the call, giving up after `seconds`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Ask the driver to do nothing for `seconds`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. retry_after: the header, as sent."""

    status: int
    body: bytes
    retry_after: str | None = None


Steps = Generator[Send | Wait, Reply | Exception | None, Json]


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
        self._client = httpx.Client(**self._options())
        self._async = threading.local()

    def send(self, call: Call) -> Json:
        """The JSON of a 200 answer. Raises RequestFailed."""
        steps = _attempts(call, timeout=self.timeout, retries=self.retries)
        step = next(steps)
        try:
            while True:
                if isinstance(step, Wait):
                    time.sleep(step.seconds)
                    step = steps.send(None)
                    continue
                try:
                    reply = self._reply(call, step.seconds)
                except Exception as error:  # sorted out by the loop, which raises what it does not know
                    reply = error
                step = steps.send(reply)
        except StopIteration as end:
            return end.value

    async def asend(self, call: Call) -> Json:
        """`send` without blocking the event loop; cancelling it closes the connection."""
        steps = _attempts(call, timeout=self.timeout, retries=self.retries)
        step = next(steps)
        try:
            while True:
                if isinstance(step, Wait):
                    await asyncio.sleep(step.seconds)
                    step = steps.send(None)
                    continue
                try:
                    reply = await asyncio.wait_for(self._areply(call, step.seconds), step.seconds)
                except Exception as error:
                    reply = error
                step = steps.send(reply)
        except StopIteration as end:
            return end.value

    def close(self) -> None:
        """Close the idle connections. Safe to call twice."""
        self._client.close()

    def _reply(self, call: Call, seconds: float) -> Reply:
        """httpx's timeouts start anew with every byte, so the deadline is looked at between chunks."""
        deadline, chunks = time.monotonic() + seconds, []
        with self._client.stream(*_arguments(call), content=_content(call), timeout=seconds) as response:
            for chunk in response.iter_bytes():
                chunks.append(chunk)
                if time.monotonic() > deadline:
                    raise TimeoutError
        return Reply(response.status_code, b"".join(chunks), response.headers.get("retry-after"))

    async def _areply(self, call: Call, seconds: float) -> Reply:
        response = await self._async_client().request(*_arguments(call), content=_content(call), timeout=seconds)
        return Reply(response.status_code, response.content, response.headers.get("retry-after"))

    def _options(self) -> dict[str, object]:
        return {"base_url": self.base_url, "headers": self._headers, "limits": self._limits, "verify": self._verify}

    def _async_client(self) -> httpx.AsyncClient:
        """One client an event loop: connections cannot move between loops."""
        import httpx

        loop = asyncio.get_running_loop()
        if getattr(self._async, "loop", None) is not loop:
            self._async.loop = loop
            self._async.client = httpx.AsyncClient(**self._options())
        return self._async.client


def _attempts(call: Call, *, timeout: float, retries: int) -> Steps:
    import httpx

    deadline, failed = time.monotonic() + timeout, None
    for attempt in range(retries + 1):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        answer = yield Send(left)
        if isinstance(answer, httpx.ConnectError | httpx.ConnectTimeout):
            failed = RequestFailed(f"no connection to the server: {answer or type(answer).__name__}")
        elif isinstance(answer, httpx.TimeoutException | TimeoutError):
            raise RequestFailed(f"no answer within {timeout:g} s") from answer
        elif isinstance(answer, httpx.TransportError):
            raise RequestFailed(f"the connection broke: {answer or type(answer).__name__}") from answer
        elif isinstance(answer, Exception):
            raise answer
        elif answer.status == 429 or answer.status >= 500:
            failed = RequestFailed(f"HTTP {answer.status}: {_message(answer)}", answer.status)
        elif answer.status != 200:
            raise RequestFailed(f"HTTP {answer.status}: {_message(answer)}", answer.status)
        else:
            return _parsed(answer)
        wait = _pause(attempt, None if isinstance(answer, Exception) else answer.retry_after)
        if attempt == retries or time.monotonic() + wait >= deadline:
            break
        yield Wait(wait)
    raise RequestFailed(f"{failed or 'not sent'} (gave up after {attempt + 1} tries, deadline {timeout:g} s)",
                        None if failed is None else failed.status)  # fmt: skip


def _pause(attempt: int, retry_after: str | None) -> float:
    """Seconds to wait; what the server asks for, else doubling with up to a quarter of jitter."""
    if retry_after is not None and retry_after.isdigit():
        return float(retry_after)
    return min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.75, 1.0)


def _arguments(call: Call) -> tuple[str, str]:
    return ("GET" if call.body is None else "POST"), call.path


def _content(call: Call) -> bytes | None:
    return None if call.body is None else json.dumps(call.body, allow_nan=False).encode()


def _parsed(reply: Reply) -> Json:
    try:
        parsed = json.loads(reply.body)
    except ValueError as error:
        raise RequestFailed(f"the answer is not JSON: {_shown(reply)!r}", reply.status) from error
    if not isinstance(parsed, dict | list):
        raise RequestFailed(f"the answer is {parsed!r}, not an object or a list", reply.status)
    return parsed


def _message(reply: Reply) -> str:
    """What the server says went wrong, whatever it wraps it in."""
    try:
        found = json.loads(reply.body)
    except ValueError:
        return _shown(reply) or "no message"
    for key in ("error", "message", "detail"):
        while isinstance(found, dict) and key in found:
            found = found[key]
    return str(found)[:SHOWN]


def _shown(reply: Reply) -> str:
    return reply.body[:SHOWN].decode(errors="replace")
