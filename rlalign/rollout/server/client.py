"""One vLLM server over HTTP: its routes, and what each failure means.

Unreachable: nobody knows whether the server did it. Refused: the server answered, and said no. What may safely happen twice is
repeated here (pausing, stamping); a worker RPC only where it never reached the server. Sampling is repeated by the dispatcher.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlalign.rollout.engine.surface import labelled
from rlalign.rollout.server.wire import ANSWER, Completion

if TYPE_CHECKING:
    import httpx

WAITS = (0.1, 0.3, 1.0)  # seconds before another attempt
BUSY = (429, 503)  # not accepted: nothing has happened yet
IDLE = 2.0  # seconds an unused connection is kept: less than the 5 after which uvicorn closes it under a request
SHOWN = 400  # characters of a server's message that an error repeats
DEV_MODE = "start it with `rlalign rollout-server`, or with VLLM_SERVER_DEV_MODE=1 where rlalign is installed"


class Unreachable(RuntimeError):
    """No usable answer came: no connection, a broken one, or none in time."""


class Refused(RuntimeError):
    """The server answered with an error, or otherwise than it should. status: HTTP's."""

    def __init__(self, message: str, status: int = 200) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """The routes of one server. All methods are coroutines of one event loop."""

    def __init__(self, url: str, *, key: str | None) -> None:
        import httpx

        self.url = url.rstrip("/")
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Content-Type": "application/json"},
            limits=httpx.Limits(max_connections=None, keepalive_expiry=IDLE),
            verify=self.url.startswith("https"),  # reading the certificates takes longer than many a call
            trust_env=False,  # a proxy of the outside world is not for servers of one's own
        )

        if key:
            self.use_key(key)

    def use_key(self, key: str) -> None:
        """Send this key from now on."""
        self._http.headers["Authorization"] = f"Bearer {key}"

    async def close(self) -> None:
        await self._http.aclose()

    async def healthy(self, timeout: float) -> str | None:
        """None when the server is alive, else why it is not thought to be."""
        try:
            answer = await asyncio.wait_for(self._http.get("/health", timeout=timeout), timeout)
        except Exception as error:  # whatever it is, it is no sign of life
            return _reason(error)
        return None if answer.status_code == 200 else f"/health says {answer.status_code}"

    async def generate(self, body: bytes, timeout: float) -> list[Completion]:
        """The completions of one request, in order. Raises Unreachable also for one that the server gave up."""
        raw = await self._post("/inference/v1/generate", body, timeout, once=True)  # the next may be another server's
        try:
            found = sorted(ANSWER.decode(raw).choices, key=lambda c: c.index)
        except ValueError as error:
            raise Refused(f"{self.url}: an answer that is not vLLM's of 0.32 or later ({error})") from error
        if any(c.finish_reason == "abort" for c in found):
            raise Unreachable(f"{self.url}: gave the request up (it is ending, or somebody aborted it)")
        return found

    async def rpc(self, method: str, args: tuple, timeout: float) -> list[dict]:
        """One RPC on every worker. Raises Refused naming the host and the remedy where the server cannot do it."""
        body = json.dumps({"method": method, "args": args, "timeout": timeout}).encode()
        try:
            raw = await self._post("/collective_rpc", body, timeout, once=True)
        except Refused as error:
            if error.status in (404, 405):
                raise Refused(
                    f"{self.url} has no /collective_rpc: its development routes are off; {DEV_MODE}", 404
                ) from error
            if "has no attribute" in str(error) and method in str(error):
                raise Refused(
                    f"{self.url} has no worker RPC {method}: rlalign is not in it; {DEV_MODE}", 500
                ) from error
            raise Refused(f"{self.url}: {method} failed: {error}", error.status) from error
        answers = _field(raw, "results", self.url)
        if not isinstance(answers, list):
            raise Refused(f"{self.url}: {method} answered {answers!r}, expected one answer a rank")
        return [labelled(answer, rank, self.url, method) for rank, answer in enumerate(answers)]

    async def prompt_logprobs(self, sequences: Sequence[Sequence[int]], timeout: float) -> list[list[float]]:
        """Logprobs of given tokens in one prefill each, entry 0 is 0.0, by the OpenAI route that every `vllm serve` has."""
        models = await self._send("GET", "/v1/models", None, timeout)
        _require_ok(models, self.url)
        body = {"model": _field(models.content, "data", self.url)[0]["id"], "prompt": [list(ids) for ids in sequences]}
        body |= {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        raw = await self._post("/v1/completions", json.dumps(body).encode(), timeout)
        choices = sorted(_field(raw, "choices", self.url), key=lambda c: c["index"])
        return [
            [0.0] + [e[str(t)]["logprob"] for e, t in zip(choice["prompt_logprobs"][1:], ids[1:], strict=True)]
            for choice, ids in zip(choices, sequences, strict=True)
        ]

    async def require_generate(self, timeout: float) -> None:
        """Raise Refused where /inference/v1/generate is switched off. Samples nothing: the body is refused."""
        answer = await self._send("POST", "/inference/v1/generate", b"{}", timeout)
        if answer.status_code not in (400, 422):
            raise Refused(
                f"{self.url}: /inference/v1/generate answers {answer.status_code}; start the server with --enable-scale-out "
                "(vLLM 0.32 or later), as `rlalign rollout-server` does",
                answer.status_code,
            )

    async def version(self, timeout: float) -> str:
        """vLLM's version."""
        answer = await self._send("GET", "/version", None, timeout)
        _require_ok(answer, self.url)
        return str(_field(answer.content, "version", self.url))

    async def pause(self, timeout: float) -> None:
        """Stop between two engine steps; running requests stay, and their keys and values are computed again afterwards.

        Blocks of the prefix cache go, too: vLLM answers with an error, here Refused, where it keeps some.
        """
        await self._post("/pause?mode=keep&clear_cache=true", b"{}", timeout)

    async def resume(self, timeout: float) -> None:
        await self._post("/resume", b"{}", timeout)

    async def stamp(self, label: str, timeout: float) -> None:
        """Label what is sampled from now on; only while paused."""
        await self._post("/update_weight_version", json.dumps({"new_version": label}).encode(), timeout)

    # --- inside ---

    async def _post(self, path: str, body: bytes, timeout: float, *, once: bool = False) -> bytes:
        """once: not to be repeated when it may have reached the server."""
        answer = await self._send("POST", path, body, timeout, once=once)
        _require_ok(answer, self.url)
        return answer.content

    async def _send(
        self, method: str, path: str, body: bytes | None, timeout: float, *, once: bool = False
    ) -> httpx.Response:
        import httpx

        for wait in (*WAITS, None):
            try:
                answer = await asyncio.wait_for(
                    self._http.request(method, path, content=body, timeout=httpx.Timeout(timeout, connect=10.0)),
                    timeout,
                )
            except (httpx.HTTPError, OSError, TimeoutError) as error:
                never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                in_time = not isinstance(error, TimeoutError | httpx.TimeoutException) or never_sent
                if wait is None or not in_time or (once and not never_sent):
                    raise Unreachable(f"{self.url}: {_reason(error)}") from error
            else:
                if answer.status_code not in BUSY or wait is None:
                    return answer
            await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")


def _require_ok(answer: httpx.Response, url: str) -> None:
    status = answer.status_code
    if status == 200:
        return
    message = _message(answer)
    if status in BUSY:
        raise Unreachable(f"{url}: busy ({status}): {message}")
    if status in (401, 403) and "scale" not in message:
        raise Refused(
            f"{url}: {status} {message}; set RLALIGN_ROLLOUT_KEY to the key the server was started with", status
        )
    raise Refused(f"{message} ({url}, {status})", status)


def _field(raw: bytes, name: str, url: str) -> object:
    try:
        return json.loads(raw)[name]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{url}: an answer without {name!r}; is that a vLLM server?") from error


def _message(answer: httpx.Response) -> str:
    """What the server says went wrong, whatever it wraps it in."""
    try:
        found = answer.json()
    except ValueError:
        found = answer.text
    for name in ("error", "message", "detail"):
        while isinstance(found, dict) and name in found:
            found = found[name]
    return str(found)[:SHOWN] or "no message"


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
