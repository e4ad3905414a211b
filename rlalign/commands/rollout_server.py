"""`rlalign rollout-server` and `rlalign attach-check URL`: vLLM's own HTTP server started for a run, and a living one looked at."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import rlalign
from rlalign.config import RunConfig
from rlalign.config.sections import MEMORY_OF_ONE_BOX
from rlalign.rollout.server import process_guard as guard

if TYPE_CHECKING:
    from torch import Tensor

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


CHECKED = ("rank", "mode", "body", "probe", "last call", "calls", "version", "head")


def add_check_options(parser: ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("url", help="of a `vllm serve` with VLLM_SERVER_DEV_MODE=1, such as http://host:8000")
    parser.add_argument(
        "--head-dtype",
        default="float32",
        choices=("float32", "master", "model"),
        help="what it must check (default %(default)s)",
    )
    parser.add_argument("--model", type=Path, help="compare its weights with those of this Hugging Face folder")
    parser.add_argument(
        "--shared", type=Path, default=Path(MEMORY_OF_ONE_BOX), help="a folder that both can read (default %(default)s)"
    )


def check(arguments: Namespace) -> int:
    """Ask, print and compare; the server is left as it is. Raises RuntimeError for what does not fit, which is exit code 1."""
    from rlalign.rollout.attached import attach

    key = os.environ.get("RLALIGN_ROLLOUT_KEY")
    engine = attach(
        arguments.url, head_dtype=arguments.head_dtype, key=key, shared=arguments.shared, after_generation=True
    )  # fmt: skip
    try:
        for line in _table(engine.status()):
            print(line)
        if arguments.model is not None:
            found = engine.verify(_folder_weights(arguments.model), hold=False)
            print(
                f"{found.tensors} weights of {arguments.model} are what {found.ranks} ranks compute with ({found.seconds:.1f} s)"
            )
    finally:
        engine.detach()
    return 0


def _table(statuses: list[dict]) -> list[str]:
    """One line a rank, under a head line."""

    def dtype(found: dict | None) -> str:
        return "-" if found is None or found["dtype"] is None else str(found["dtype"])

    rows = [
        (s["rank"], s["mode"], s["body_dtype"], dtype(s["multiplied"]["probe"]), dtype(s["multiplied"]["sampled"]), s["calls"],
         s["policy_version"], s["head"])
        for s in statuses
    ]  # fmt: skip
    cells = [CHECKED, *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(CHECKED))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _folder_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's safetensors files, by name. Raises ValueError for a folder without any."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"--model {folder}: no *.safetensors there")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                yield name, tensors.get_tensor(name)
