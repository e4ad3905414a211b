"""How `rlalign serve` ends: SIGTERM, a drain that is too short, kill -9. No ending gives a wrong score."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.reward_serving import fingerprint

SLOW = """
from rlalign.serve import ServerSettings, create_app
from rlalign.commands.serve import bound, until_signal
from tests.reward_serving import HashScorer
settings = ServerSettings(drain_s={drain_s})
listener = bound("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
raise SystemExit(until_signal(create_app(HashScorer(seconds={seconds}), settings), settings, listener))
"""


@contextmanager
def slow_server(*, seconds: float, drain_s: float) -> Iterator[tuple[subprocess.Popen, str]]:
    """A process whose every batch takes `seconds`; the process and its URL."""
    command = [sys.executable, "-c", SLOW.format(seconds=seconds, drain_s=drain_s)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            url = f"http://127.0.0.1:{int(process.stdout.readline())}"
            while True:
                try:
                    httpx.get(f"{url}/health")
                    break
                except httpx.TransportError:
                    assert process.poll() is None
                    time.sleep(0.02)
            yield process, url
        finally:
            process.kill()


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline, "it did not happen"


def asked(url: str, count: int) -> tuple[list[threading.Thread], dict[int, object]]:
    """Clients that wait for one answer each; what each got: its scores, an error's code, or the name of what broke."""
    got: dict[int, object] = {}

    def ask(i: int) -> None:
        try:
            answer = httpx.post(f"{url}/v1/score", json={"query": "q", "items": [f"item {i}"]}, timeout=30)
            got[i] = answer.json()["scores"] if answer.status_code == 200 else answer.json()["error"]["code"]
        except httpx.TransportError as error:
            got[i] = type(error).__name__

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(count)]
    threads[0].start()
    wait_for(lambda: httpx.get(f"{url}/health").json()["batch_seconds"] > 0)
    for thread in threads[1:]:
        thread.start()
    wait_for(lambda: httpx.get(f"{url}/health").json()["queued_requests"] == count - 1)
    return threads, got


def test_sigterm_answers_everything_that_was_accepted():
    with slow_server(seconds=1.5, drain_s=10) as (process, url):
        threads, got = asked(url, 4)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert got == {i: [[fingerprint("q", f"item {i}")]] for i in range(4)}
        assert process.wait(10) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_a_drain_that_takes_too_long_cuts_off_and_says_so_by_its_exit_code():
    with slow_server(seconds=30, drain_s=1) as (process, url):
        threads, got = asked(url, 1)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert got == {0: 503}
        assert process.wait(10) == 1


def test_kill_9_leaves_an_error():
    with slow_server(seconds=30, drain_s=1) as (process, url):
        threads, got = asked(url, 2)
        process.kill()
        for thread in threads:
            thread.join()
        assert all(isinstance(answer, str) for answer in got.values()), got
