"""`rlalign serve` under load: clients at once, every answer checked against its own items; drained, killed, and fuzzed.

load: --clients for --seconds, then SIGTERM; memory of the server once a second. drain, kill: SIGTERM or kill -9 after half of
the time, and a new server in its place. fuzz: --count hostile requests. Starts real servers over a random tiny reward model
with four labels. The right answers come from HFScorer in this process; no two questions have answers closer than ten
tolerances, so a crossed answer shows. Prints JSON; --write appends to results/serve.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from serve_clients import Outcome, Questions, Server, ask_questions, client, exchange, tiny_model

from rlalign.ranks import free_port

RESULTS = Path(__file__).parent / "results" / "serve.md"
HEADER = """# `rlalign serve` under load

Written by `python benchmarks/serve_load.py MODE --write`. A random Qwen3 classifier (2 layers, 64 hidden, 4 labels, float32) in a
server process of its own, one thread; the clients share the machine. Requests have one to eight items. wrong: answers that are
not those of their own items (tolerance 1e-4, no two answers are closer than ten times that). lost: requests that ended neither
in an answer nor in an error. failed: by HTTP status; 0 is a connection that broke or was refused (clients try again every 50 ms
while there is no server). rss_mib: of the server, medians of the middle and the last third of the time.
"""


async def load(model: Path, questions: Questions, log: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """The clients, and the memory; SIGTERM afterwards."""
    server = Server(model, free_port(), log)
    await server.ready()
    outcome, stop, began = Outcome(), asyncio.Event(), time.monotonic()
    clients = [asyncio.create_task(client(i, server.port, questions, outcome, stop)) for i in range(arguments.clients)]
    while time.monotonic() < began + arguments.seconds:
        await asyncio.sleep(1)
        outcome.rss_mib.append(server.rss_mib())
    stop.set()
    await asyncio.gather(*clients)
    return outcome.summary(time.monotonic() - began) | {"exit_code": server.end()}


async def drain(model: Path, questions: Questions, log: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """SIGTERM in the middle: what was accepted is answered rightly, later connections are refused, the exit code is 0."""
    return await interrupted(model, questions, log, arguments, signal.SIGTERM)


async def kill(model: Path, questions: Questions, log: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """kill -9 in the middle, and a new server on the same port: errors in between, right answers before and after."""
    return await interrupted(model, questions, log, arguments, signal.SIGKILL)


async def interrupted(
    model: Path, questions: Questions, log: Path, arguments: argparse.Namespace, how: signal.Signals
) -> dict[str, object]:
    """Half of the time, the signal, a new server, and the other half of the time. before, after: right answers of each server."""
    server = Server(model, free_port(), log)
    await server.ready()
    outcome, stop, began = Outcome(), asyncio.Event(), time.monotonic()
    clients = [asyncio.create_task(client(i, server.port, questions, outcome, stop)) for i in range(arguments.clients)]
    await asyncio.sleep(arguments.seconds / 2)
    code = await asyncio.to_thread(server.end, how)
    before = outcome.requests
    second = Server(model, server.port, log)
    await second.ready()
    await asyncio.sleep(arguments.seconds / 2)
    stop.set()
    await asyncio.gather(*clients)
    found = outcome.summary(time.monotonic() - began) | {"before": before, "after": outcome.requests - before}
    return found | {"exit_code": code, "second_exit_code": second.end()}


async def fuzz(model: Path, questions: Questions, log: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """--count hostile requests through --clients connections, then one that must still be answered rightly."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.reward_fuzz import hostile_requests

    server = Server(model, free_port(), log, "--request-timeout-s", "20", "--max-items", "64")
    await server.ready()
    waiting = list(hostile_requests(arguments.count, seed=7))
    statuses: Counter[int] = Counter()
    slowest, began = 0.0, time.monotonic()

    async def send() -> None:
        nonlocal slowest
        while waiting:
            one, start = waiting.pop(), time.monotonic()
            connection = await asyncio.open_connection("127.0.0.1", server.port)
            status, body = await asyncio.wait_for(
                exchange(connection, one.method, one.path, one.body, one.content_type or "text/plain"), 60
            )
            connection[1].close()
            statuses[status] += 1
            slowest = max(slowest, time.monotonic() - start)
            if status >= 500:
                print(f"{status} for {one}: {body[:300]!r}", file=sys.stderr)

    await asyncio.gather(*(send() for _ in range(arguments.clients)))
    seconds = time.monotonic() - began
    outcome = Outcome()
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(1, stop.set)
    await client(0, server.port, questions, outcome, stop)
    found = {str(status): count for status, count in sorted(statuses.items())}
    return {
        "seconds": round(seconds, 1), "requests": statuses.total(), "statuses": found, "slowest_ms": round(slowest * 1e3, 1),
        "right_afterwards": outcome.requests, "wrong": outcome.wrong, "exit_code": server.end(),
    }  # fmt: skip


def markdown(mode: str, arguments: argparse.Namespace, result: dict[str, object]) -> str:
    """One section."""
    size = f"{arguments.count} requests" if mode == "fuzz" else f"{arguments.seconds:g} s"
    lines = [
        f"\n## {mode}, {arguments.clients} clients, {size} ({platform.machine()}, Python {platform.python_version()})\n"
    ]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in result.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run one mode; see the module's docstring."""
    modes = {"load": load, "drain": drain, "kill": kill, "fuzz": fuzz}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=modes)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--count", type=int, default=10_000, help="hostile requests (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to a file as well")
    parser.add_argument("--write", action="store_true", help="append to results/serve.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny-reward"
        tiny_model(model)
        questions = ask_questions(model)
        result = asyncio.run(modes[arguments.mode](model, questions, Path(folder) / "log", arguments))
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result))
    if arguments.write:
        text = RESULTS.read_text() if RESULTS.exists() else HEADER
        RESULTS.write_text(text + markdown(arguments.mode, arguments, result))


if __name__ == "__main__":
    main()
