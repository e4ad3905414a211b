"""rlalign rollout-server: vLLM's own HTTP server with the run's head, proved, announced in a folder, ended cleanly on SIGTERM."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import rlalign
from rlalign.config import RunConfig
from rlalign.rollout.server import process_guard as guard

if TYPE_CHECKING:
    from rlalign.rollout.server.greeting import Greeting
    from rlalign.rollout.server.launching import Launch, ServerProcess
    from rlalign.rollout.server.roster import Announcement


def add_options(parser: ArgumentParser) -> None:
    """The command line, apart from the configuration."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="default %(default)s; 0.0.0.0 for other hosts to reach it, then with a key "
        f"({guard.KEY_VARIABLE}, or one made here and told in the ready file)",
    )
    parser.add_argument("--port", type=int, default=0, help="default 0: a free one")
    parser.add_argument(
        "--ready-folder",
        type=Path,
        metavar="DIR",
        help="where the ready file goes, for rollout.server_folder of the run (default: that setting)",
    )


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Hydra overrides, and vLLM's own options: everything from the first word that starts with a dash."""
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first], words[first:]


def run(config: RunConfig, model: Path, arguments: Namespace, options: list[str]) -> int:
    """Serve until SIGTERM or SIGINT; returns 0 then, 1 where vLLM ended by itself.

    Raises OSError for a port that is taken, RuntimeError for a server that does not start or is not what the configuration says.
    """
    from rlalign.rollout.engine import handshake
    from rlalign.rollout.server.launching import Launch, ServerProcess
    from rlalign.rollout.server.roster import announce

    handshake.preflight()
    folder = arguments.ready_folder or (Path(config.rollout.server_folder) if config.rollout.server_folder else None)
    key = os.environ.get(guard.KEY_VARIABLE) or None
    if key is None and arguments.host not in guard.LOOPBACK and folder is not None:
        key = secrets.token_hex(16)  # the ready file tells it to whoever may read that
    launch = Launch.of(config, model, options)
    ending = _ending()
    server = ServerProcess(launch, host=arguments.host, port=arguments.port, key=key, log=None)
    announced: Path | None = None
    try:
        if server.wait_ready(time.monotonic() + config.rollout.start_timeout_s, ending):
            greeting = asyncio.run(_greet(server.url, key, launch))
            if folder is not None:
                announced = announce(folder, _announcement(server, greeting, model, key))
            print(f"rollout server ready: {server.url} (vLLM {greeting.version}, head {greeting.mode})", flush=True)
        while server.process.poll() is None and not ending():
            time.sleep(0.2)
    finally:
        if announced is not None:
            announced.unlink(missing_ok=True)
        code = server.process.poll()
        server.stop()
    if code is not None and not ending():
        raise RuntimeError(f"the rollout server at {server.url} ended by itself with code {code}; its output is above")
    return 0


async def _greet(url: str, key: str | None, launch: Launch) -> Greeting:
    from rlalign.rollout.server.client import Client
    from rlalign.rollout.server.greeting import greet

    client = Client(url, key=key)
    try:
        return await greet(client, launch)
    finally:
        await client.close()


def _announcement(server: ServerProcess, greeting: Greeting, model: Path, key: str | None) -> Announcement:
    from rlalign.rollout.server.roster import Announcement

    return Announcement(
        url=server.url,
        host=socket.gethostname(),
        pid=server.process.pid,
        model=str(model),
        vllm=greeting.version,
        rlalign=rlalign.__version__,
        key=key,
    )


def _ending() -> Callable[[], bool]:
    """True once SIGTERM or SIGINT has come."""
    came: list[int] = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, _: came.append(number))
    return lambda: bool(came)
