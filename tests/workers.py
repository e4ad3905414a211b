"""Rollout workers without an engine: they take what a publish sends as real workers do, and keep it for the test to look at."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from rlalign.weights.bucket import Entry
from rlalign.weights.file_transport import greet, read

HERE = {"host": "here", "device": "cpu"}


class FileWorkers:
    """Engines of one worker each, which read the buckets. spoil: (engine, method, told) -> problems of that answer."""

    def __init__(self, *engines: str, spoil: Callable[[str, str, dict], list[str]] = lambda *_: []) -> None:
        self.engines, self.spoil = list(engines), spoil
        self.held = {engine: {} for engine in engines}
        self.versions = dict.fromkeys(engines, 0)
        self.fingerprints = dict.fromkeys(engines, "same")
        self.events: list[str] = []
        self.wholes: list[bool] = []  # whether each proof asked for all weights

    def ask(self, method, *args):
        return [{"rank": 0, "problems": [], **self._do(e, method, *args), "engine": e} for e in list(self.engines)]

    def _do(self, engine, method, told=None):
        held, problems = self.held[engine], self.spoil(engine, method, told)
        self.events.append(method.removeprefix("rlalign_"))
        if problems:
            return {"problems": problems}
        match method:
            case "rlalign_whereabouts":
                return HERE | {"pid": -1, "version": self.versions[engine]}
            case "rlalign_begin":
                held.clear()
                return {"problems": greet(Path(told["hello"]), 0.1)}
            case "rlalign_take":
                entries = [Entry(**entry) for entry in told["entries"]]
                data, problems = read(Path(told["file"]), entries, mapped=told["mapped"], timeout_s=0.2)
                held.update({} if data is None else {e.name: e.view(data).clone() for e in entries})
                return {"problems": problems}
            case "rlalign_finish":
                self.wholes.append(told["whole"])
                size = sum(t.nbytes for t in held.values())
                ack = {"version": told["version"], "tensors": len(held), "bytes": size, "repaired": [], "rebuilds": 0}
                return ack | {"fingerprint": self.fingerprints[engine]}
        return {}

    def suspend(self, reason):
        self.events.append(f"suspend: {reason}")

    def acknowledge(self, version):
        self.events.append("acknowledge")
        self.versions = dict.fromkeys(self.engines, version)


class GlooWorkers(FileWorkers):
    """Workers in processes of their own, in a gloo group with this one. A process that ends leaves `engines`."""

    def __init__(self, *engines: str) -> None:
        super().__init__(*engines)
        self.processes = {
            engine: subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for engine in engines
        }
        self.ask("rlalign_whereabouts")  # they have started

    def ask(self, method, *args):
        return self.ask_each(method, [args] * len(self.engines))

    def ask_each(self, method, args_of_engine):
        engines = list(self.engines)
        with ThreadPoolExecutor(len(engines)) as threads:
            answers = list(
                threads.map(self._do, engines, [method] * len(engines), [a[0] if a else None for a in args_of_engine])
            )
        self.engines = [e for e, answer in zip(engines, answers, strict=True) if answer is not None]
        return [{**answer, "engine": e} for e, answer in zip(engines, answers, strict=True) if answer is not None]

    def _do(self, engine, method, told=None):
        process = self.processes[engine]
        try:
            process.stdin.write(json.dumps([method, told]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return {"rank": 0, "problems": [], **json.loads(line)} if line else None

    def close(self):
        for process in self.processes.values():
            process.kill()
            process.communicate()


def serve() -> None:
    """One worker process: JSON lines in, JSON lines out."""
    import os

    from rlalign.weights import digest
    from rlalign.weights.groups import GlooGroup, worker_name

    group, held = None, {}
    for line in sys.stdin:
        method, told = json.loads(line)
        answer: dict = {}
        try:
            if method == "rlalign_whereabouts":
                answer = HERE | {"pid": os.getpid(), "version": 0}
            elif method == "rlalign_join":
                i = told["init"]
                name = worker_name(i["engine"], 0)
                group = GlooGroup.join(i["address"], i["port"], i["size"], name=name, timeout_s=i["timeout_s"])
            elif method == "rlalign_take":
                entries = [Entry(**entry) for entry in told["update"]["entries"]]
                data = group.receive(entries[-1].end)
                held |= {e.name: e.view(data) for e in entries}
                wrong = [e.name for e in entries if digest(held[e.name]) != e.digest]
                answer = {"problems": [f"{name}: its bytes are not those that were sent" for name in wrong]}
            elif method == "rlalign_finish":
                size = sum(t.nbytes for t in held.values())
                ack = {"version": told["version"], "tensors": len(held), "bytes": size, "repaired": [], "rebuilds": 0}
                answer = ack | {"fingerprint": "".join(digest(t) for t in held.values())}
            elif method == "rlalign_begin":
                held.clear()
        except Exception as error:
            answer = {"problems": [str(error)]}
        print(json.dumps(answer), flush=True)


def model(*, size: int = 40, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of several dtypes, some of odd length, so that not every tensor can start where the last one ended."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)
    return {
        f"layers.{i}.weight": torch.randn(3 + i, 2 * i + 1, generator=generator).to(dtypes[i % len(dtypes)])
        for i in range(size)
    } | {"scalar": torch.tensor(1.5), "none": torch.empty(0, 4)}


if __name__ == "__main__":
    serve()
