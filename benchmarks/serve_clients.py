"""What benchmarks/serve_load.py needs: a tiny reward model, questions with known answers, servers, and clients that check."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch

TOLERANCE, MARGIN = 1e-4, 10
QUERIES, ITEMS = 60, 20  # questions: every query with every one of its items


@dataclass
class Outcome:
    """What the clients saw. failed: requests without a 200, by status; 0 is no answer at all. rss_mib: once a second."""

    started: int = 0
    requests: int = 0
    items: int = 0
    wrong: int = 0
    failed: Counter[int] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)

    def summary(self, seconds: float) -> dict[str, object]:
        """memory: medians of the samples' middle and last third, and the least-squares slope over both."""
        p50, p99 = np.quantile(self.latencies_s or [np.nan], [0.5, 0.99]) * 1e3
        found = {
            "seconds": round(seconds, 1),
            "requests": self.requests,
            "items": self.items,
            "wrong": self.wrong,
            "lost": self.started - self.requests - self.failed.total(),
            "failed": {str(status): count for status, count in sorted(self.failed.items())},
            "requests_per_s": round(self.requests / seconds, 1),
            "p50_ms": round(p50, 1),
            "p99_ms": round(p99, 1),
        }
        third = len(self.rss_mib) // 3
        if third:
            late = self.rss_mib[third:]
            slope = float(np.polyfit(range(len(late)), late, 1)[0]) * 60
            found["rss_mib"] = [round(median(self.rss_mib[third:-third]), 1), round(median(self.rss_mib[-third:]), 1)]
            found["rss_slope_mib_per_minute"] = round(slope, 2)
        return found


@dataclass(frozen=True)
class Questions:
    """texts and logits_QIK: what to ask, and what the answer must be."""

    queries: list[str]
    items: list[list[str]]
    logits_QIK: np.ndarray

    def pick(self, rng: random.Random) -> tuple[dict[str, object], np.ndarray]:
        """A request of one to eight items, and its right answer."""
        q = rng.randrange(QUERIES)
        chosen = rng.sample(range(ITEMS), rng.randint(1, 8))
        return {"query": self.queries[q], "items": [self.items[q][i] for i in chosen]}, self.logits_QIK[q, chosen]


class Server:
    """A process of `rlalign serve`."""

    def __init__(self, model: Path, port: int, log: Path, *options: str) -> None:
        self.port = port
        command = [sys.executable, "-m", "rlalign.cli", "serve", str(model), "--port", str(port), *options]
        self.log = log.open("a")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)

    async def ready(self) -> None:
        """Wait until /health answers."""
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"the server ended with {self.process.returncode}:\n{Path(self.log.name).read_text()}"
                )
            with suppress(OSError, asyncio.IncompleteReadError, ValueError):
                status, _ = await exchange(await asyncio.open_connection("127.0.0.1", self.port), "GET", "/health")
                if status == 200:
                    return
            await asyncio.sleep(0.2)

    def rss_mib(self) -> float:
        """Resident memory now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait. Returns the exit code."""
        self.process.send_signal(how)
        code = self.process.wait(60)
        self.log.close()
        return code


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def exchange(
    connection: Connection, method: str, path: str, body: bytes = b"", kind: str = "application/json"
) -> tuple[int, bytes]:
    """One request over a kept connection: status and body. Raises OSError or IncompleteReadError when it breaks."""
    reader, writer = connection
    head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
    status = int(lines[0].split()[1])
    answer = b"" if method == "HEAD" else await reader.readexactly(length)
    if any(line.replace(" ", "") == "connection:close" for line in lines):
        writer.close()
    return status, answer


async def client(number: int, port: int, questions: Questions, outcome: Outcome, stop: asyncio.Event) -> None:
    """Ask until told to stop, over one connection that is opened again whenever it breaks."""
    rng = random.Random(number)
    connection: Connection | None = None
    while not stop.is_set():
        body, expected = questions.pick(rng)
        outcome.started += 1
        began = time.monotonic()
        try:
            connection = connection or await asyncio.open_connection("127.0.0.1", port)
            status, answer = await exchange(connection, "POST", "/v1/score", json.dumps(body).encode())
        except (OSError, asyncio.IncompleteReadError):
            outcome.failed[0] += 1
            connection = None
            await asyncio.sleep(0.05)
            continue
        if connection[1].is_closing():
            connection = None
        if status != 200:
            outcome.failed[status] += 1
            await asyncio.sleep(0.05)
            continue
        scores = np.array(json.loads(answer)["scores"])
        right = scores.shape == expected.shape and np.abs(scores - expected).max() < TOLERANCE
        outcome.wrong += not right
        outcome.requests += 1
        outcome.items += len(expected)
        outcome.latencies_s.append(time.monotonic() - began)
    if connection is not None:
        connection[1].close()


def tiny_model(folder: Path) -> None:
    """A random classifier of four labels with a byte tokenizer."""
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    from rlalign.tiny_policy.tokenizer import byte_tokenizer

    torch.manual_seed(0)
    tokenizer = byte_tokenizer(1024)
    config = Qwen3Config(
        vocab_size=288, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, num_labels=4, initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ask_questions(model: Path) -> Questions:
    """Raises RuntimeError where two answers are too close to be told apart."""
    from rlalign.scoring.hf import HFScorer

    rng = random.Random(0)
    scorer = HFScorer(str(model))
    queries = [f"Question {rng.randrange(10**6)}: " + "please " * rng.randint(0, 12) for _ in range(QUERIES)]
    items = [[f"{rng.randrange(10**9)}" + "!" * rng.randint(0, 40) for _ in range(ITEMS)] for _ in range(QUERIES)]
    logits_QIK = np.array([scorer.score(query, texts).logits for query, texts in zip(queries, items, strict=True)])
    flat = torch.from_numpy(logits_QIK.reshape(QUERIES * ITEMS, -1)).double()
    closest = float(torch.nn.functional.pdist(flat, p=float("inf")).min())
    if closest < MARGIN * TOLERANCE:
        raise RuntimeError(
            f"two answers are only {closest:.2g} apart; {MARGIN * TOLERANCE:.2g} is needed to tell them apart"
        )
    return Questions(queries, items, logits_QIK)
