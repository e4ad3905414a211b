"""vLLM's own HTTP server as a process of ours: command line, environment, readiness, end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from rlalign.rollout.server import process_guard as guard
from rlalign.rollout.server.greeting import Launch
from rlalign.rollout.server.pool import ServerPool

GRACE = 20.0  # seconds between SIGTERM and SIGKILL
VISIBLE = "CUDA_VISIBLE_DEVICES"
TAIL = 3000  # characters of a log that an error repeats


class ServerProcess:
    """One vLLM server with all its processes, tied to this one: it ends when we do."""

    def __init__(
        self, launch: Launch, *, host: str, port: int, key: str | None, log: Path | None, devices: str | None = None
    ) -> None:
        """Start it; port 0 takes a free one. log: None writes to our own output; devices: CUDA's that it may see, None: ours.

        Raises OSError naming who holds the port, ValueError where a key is needed.
        """
        if host not in guard.LOOPBACK and not key:
            raise ValueError(
                f"--host {host} without a key: who reaches the server's development routes can run code in it; set "
                f"{guard.KEY_VARIABLE}, for example to the output of `openssl rand -hex 16`"
            )
        reserved = reserve(host, port)  # until vLLM itself listens there
        self.port = reserved.getsockname()[1]
        reachable = socket.gethostname() if host in ("0.0.0.0", "::") else host
        self.url = f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{self.port}"
        self._log, self._reserved = log, reserved
        tether = [sys.executable, "-m", guard.__name__, str(os.getpid())]
        with contextlib.ExitStack() as stack:
            out: IO[bytes] | None = None
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                out = stack.enter_context(log.open("wb"))
            self.process = subprocess.Popen(
                [*tether, *launch.command(host, self.port, key)],
                env=launch.environment(key) | ({} if devices is None else {VISIBLE: devices}),
                stdout=out,
                stderr=subprocess.STDOUT if out else None,
                start_new_session=True,
            )

    def wait_ready(self, end: float, ending: Callable[[], bool] = lambda: False) -> bool:
        """Until it answers; False when `ending` says so. end: of our patience, by time.monotonic().

        Raises RuntimeError with the end of its log where it stops, or does not answer in time.
        """
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while not ending():
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"the rollout server at {self.url} ended with code {self.process.returncode} while starting{self._tail()}"
                )
            with contextlib.suppress(OSError), opener.open(f"{self.url}/health", timeout=2.0) as answer:
                if answer.status == 200:
                    self._reserved.close()
                    return True
            if time.monotonic() > end:
                raise RuntimeError(f"the rollout server at {self.url} was not ready in time{self._tail()}")
            time.sleep(0.2)
        return False

    def stop(self) -> None:
        """End it and whatever it started. Safe to call twice."""
        self._reserved.close()
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):  # what did not end by itself, or outlived its parent
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _tail(self) -> str:
        if self._log is None:
            return "; its output is above"
        return f". The end of {self._log}:\n{self._log.read_text(errors='replace')[-TAIL:]}"


def open_pool(launch: Launch, *, logs: Path, say: Callable[[str], None] = lambda message: None) -> ServerPool:
    """The servers that the configuration names: started here, running at urls, or announced in a folder.

    logs: of those started here, which end with the pool. say: see ServerPool.
    Raises RuntimeError naming each that is not ready or not right.
    """
    config, key = launch.config, os.environ.get(guard.KEY_VARIABLE) or None
    if not config.start:
        count = len(config.servers) or config.wait_for
        return ServerPool(config.servers, launch, count=count, key=key, say=say)
    started = start_all(launch, config.start, logs=logs)
    urls = [server.url for server in started]
    return ServerPool(urls, launch, count=len(urls), stop=lambda: stop_all(started), say=say)


def start_all(launch: Launch, count: int, *, logs: Path) -> list[ServerProcess]:
    """`count` servers on this machine, on free ports of 127.0.0.1, started side by side and ready.

    Raises RuntimeError with a log's end when one of them does not come up; none is left running then.
    """
    started: list[ServerProcess] = []
    try:
        for i in range(count):
            log, devices = logs / f"server-{i}.log", devices_of(i, count, launch.config.tensor_parallel_size)
            started.append(ServerProcess(launch, host="127.0.0.1", port=0, key=None, log=log, devices=devices))
        end = time.monotonic() + launch.config.start_timeout_s
        for server in started:
            server.wait_ready(end)
    except BaseException:
        stop_all(started)
        raise
    return started


def devices_of(index: int, count: int, each: int) -> str | None:
    """The CUDA devices of server `index` of `count`: the last count * each are the servers', the first the trainer ranks'.

    None where fewer are visible: the servers then share them, as rollout.gpu_memory_utilization allows.
    """
    import torch

    said = os.environ.get(VISIBLE)
    visible = [str(i) for i in range(torch.cuda.device_count())] if said is None else [d for d in said.split(",") if d]
    first = len(visible) - (count - index) * each
    return ",".join(visible[first : first + each]) if len(visible) >= count * each else None


def stop_all(servers: Sequence[ServerProcess]) -> None:
    """End them side by side."""
    for server in servers:
        if server.process.poll() is None:
            server.process.terminate()
    for server in servers:
        server.stop()


def reserve(host: str, port: int) -> socket.socket:
    """A socket bound to the address, never listening: vLLM may bind it too (SO_REUSEADDR), and nobody is given the port meanwhile.

    Raises OSError naming the process that listens there.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise OSError(
            error.errno,
            f"cannot listen on {host}:{port} of {socket.gethostname()}: {error.strerror or error}{holder_of(port)}; "
            "choose another --port, or --port 0 for a free one",
        ) from error
    return found


def holder_of(port: int) -> str:
    """ ", held by ..." for the process that listens on a port; "" where the system does not say."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                return f", held by pid {connection.pid} of {process.username()}: {' '.join(process.cmdline())[:200]}"
    return ""
