"""Dynamic batching: one queue, one worker thread, as many requests at a time as fit the token budget; and the server's counters.

While a batch runs the next one collects, so nothing waits for a timer. First come, first served: nothing overtakes, so nothing
starves. A request that is cancelled (deadline, client gone) leaves the queue, and if it runs already its result is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from rlalign.serve.bodies import ApiError

if TYPE_CHECKING:
    from rlalign.scoring.result import ScoreResult
    from rlalign.scoring.scorer import Prepared, RewardScorer

log = logging.getLogger("rlalign.server")


class ScoringFailed(RuntimeError):
    """scorer.run raised for a request that it had prepared: no fault of the client, whatever it raised."""


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """One client's request: one or more prepared ones that are answered together."""

    prepared: Sequence[Prepared]
    tokens: int
    answer: asyncio.Future[list[ScoreResult]]


class Batcher:
    """Runs prepared requests through `scorer.run`, each result back to the request that asked for it.

    Preparing has a thread of its own: tokenisers must not be used from two threads at once (huggingface/tokenizers#537),
    and a running batch should not keep bad requests from being refused.
    """

    def __init__(
        self, scorer: RewardScorer, metrics: ServerMetrics, *, max_batch_tokens: int, max_queued_tokens: int
    ) -> None:
        self._scorer = scorer
        self._metrics = metrics
        self.max_batch_tokens = max_batch_tokens
        self.max_queued_tokens = max_queued_tokens
        self._queue: dict[int, _Job] = {}  # by number, oldest first
        self._number = 0
        self._queued_tokens = 0
        self._tokens_per_s: float | None = None
        self._wake = asyncio.Event()
        self._preparing = ThreadPoolExecutor(1, "rlalign-prepare")
        self._running = ThreadPoolExecutor(1, "rlalign-run")
        self.busy_since: float | None = None  # time.monotonic() of the batch that runs now

    async def submit(self, prepare: Callable[[], Sequence[Prepared]]) -> list[ScoreResult]:
        """Results of what `prepare` returns, in its order.

        Raises whatever `prepare` does, ApiError 429 when the queue is full and 413 for more tokens than it can ever hold,
        ScoringFailed when `run` fails.
        """
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._preparing, prepare)
        if not prepared:
            return []
        tokens = sum(one.num_tokens for one in prepared)
        if tokens > self.max_queued_tokens:
            raise ApiError(413, f"{tokens} tokens, at most {self.max_queued_tokens} a request", type="too_large")
        if self._queued_tokens + tokens > self.max_queued_tokens:
            raise self.full(f"{self._queued_tokens} tokens wait already, and these are {tokens} more")
        job = _Job(prepared, tokens, loop.create_future())
        self._number += 1
        number = self._number
        self._queue[number] = job
        self._queued_tokens += tokens
        self._wake.set()
        try:
            return await job.answer
        finally:
            if self._queue.pop(number, None):  # still there: cancelled before it ran
                self._queued_tokens -= tokens

    def full(self, why: str) -> ApiError:
        """429 with the seconds after which the queue should be empty, as far as the speed so far tells."""
        wait = 1 if not self._tokens_per_s else min(60, max(1, math.ceil(self._queued_tokens / self._tokens_per_s)))
        return ApiError(
            429,
            f"the server is busy: {why}; try again in {wait} s",
            type="queue_full",
            headers={"Retry-After": str(wait)},
        )

    @property
    def queued(self) -> tuple[int, int]:
        """Requests and tokens that wait."""
        return len(self._queue), self._queued_tokens

    async def run(self) -> None:
        """Work until cancelled. One batch at a time."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            batch = self._take()
            if not batch:
                self._wake.clear()
                continue
            self.busy_since = time.monotonic()
            outcomes = await loop.run_in_executor(self._running, self._outcomes, [job.prepared for job in batch])
            self._measure(batch, time.monotonic() - self.busy_since)
            self.busy_since = None
            for job, outcome in zip(batch, outcomes, strict=True):
                if job.answer.done():  # the client has left
                    continue
                if isinstance(outcome, Exception):
                    job.answer.set_exception(outcome)
                else:
                    job.answer.set_result(outcome)

    def close(self) -> None:
        """Start nothing more. A batch that runs goes on until it ends; its results are dropped."""
        self._preparing.shutdown(wait=False, cancel_futures=True)
        self._running.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> list[_Job]:
        batch: list[_Job] = []
        tokens = 0
        while self._queue:
            number = next(iter(self._queue))
            job = self._queue[number]
            if batch and tokens + job.tokens > self.max_batch_tokens:
                break
            del self._queue[number]
            self._queued_tokens -= job.tokens
            tokens += job.tokens
            batch.append(job)
        return batch

    def _outcomes(self, jobs: Sequence[Sequence[Prepared]]) -> list[list[ScoreResult] | Exception]:
        """In the worker thread. A batch that fails is run again one by one, so that one bad request fails alone."""
        try:
            return self._together(jobs)
        except Exception as error:
            if len(jobs) == 1:
                failed = ScoringFailed(f"scorer.run: {error!r}")
                failed.__cause__ = error
                return [failed]
            log.warning("a batch of %d requests failed (%r); running them one by one", len(jobs), error)
            self._metrics.split_batches.inc()
            return [self._outcomes([job])[0] for job in jobs]

    def _together(self, jobs: Sequence[Sequence[Prepared]]) -> list[list[ScoreResult] | Exception]:
        flat = [one for job in jobs for one in job]
        results = self._scorer.run(flat)
        if len(results) != len(flat):
            raise RuntimeError(
                f"scorer.run: expected {len(flat)} results for {len(flat)} requests, got {len(results)}: nobody could "
                "tell whose they are"
            )
        found = iter(results)
        return [[next(found) for _ in job] for job in jobs]

    def _measure(self, batch: Sequence[_Job], seconds: float) -> None:
        tokens = sum(job.tokens for job in batch)
        speed = tokens / max(seconds, 1e-6)
        self._tokens_per_s = speed if self._tokens_per_s is None else 0.8 * self._tokens_per_s + 0.2 * speed
        self._metrics.batch_requests.observe(len(batch))
        self._metrics.batch_tokens.observe(tokens)
        self._metrics.batch_seconds.observe(seconds)


SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
POWERS = tuple(float(2**k) for k in range(0, 18, 2))


class ServerMetrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("rlalign_requests", "Requests answered", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "rlalign_request_seconds", "First byte to answer", ["path"], buckets=SECONDS, registry=registry
        )
        self.items = Counter("rlalign_items", "Items scored", registry=registry)
        self.failed_items = Counter("rlalign_failed_items", "Items answered with a reason instead", registry=registry)
        self.prompt_tokens = Counter("rlalign_prompt_tokens", "Tokens the model has read", registry=registry)
        self.labels = Counter("rlalign_labels", "Labels received", ["outcome"], registry=registry)
        self.split_batches = Counter("rlalign_split_batches", "Batches that failed as a whole", registry=registry)
        self.batch_requests = Histogram(
            "rlalign_batch_requests", "Requests per batch", buckets=POWERS, registry=registry
        )
        self.batch_tokens = Histogram("rlalign_batch_tokens", "Tokens per batch", buckets=POWERS, registry=registry)
        self.batch_seconds = Histogram(
            "rlalign_batch_seconds", "Seconds in scorer.run", buckets=SECONDS, registry=registry
        )
        self._calibration = Info("rlalign_calibration", "The calibration in force", registry=registry)

    def watch_queue(self, queued: Callable[[], tuple[int, int]]) -> None:
        """Read the queue's length whenever the metrics are asked for."""
        for name, what, index in (("requests", "Requests that wait", 0), ("tokens", "Tokens that wait", 1)):
            gauge = Gauge(f"rlalign_queued_{name}", what, registry=self.registry)
            gauge.set_function(lambda index=index: queued()[index])

    def calibration(self, calibration_id: str) -> None:
        """Another calibration is in force."""
        self._calibration.info({"calibration_id": calibration_id})
