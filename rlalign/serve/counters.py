"""What /metrics tells Prometheus. Every application has a registry of its own, and no label takes a client's text."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

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
        self._batch_requests = Histogram(
            "rlalign_batch_requests", "Requests per batch", buckets=POWERS, registry=registry
        )
        self._batch_tokens = Histogram("rlalign_batch_tokens", "Tokens per batch", buckets=POWERS, registry=registry)
        self._batch_seconds = Histogram(
            "rlalign_batch_seconds", "Seconds in scorer.run", buckets=SECONDS, registry=registry
        )
        self._calibration = Info("rlalign_calibration", "The calibration in force", registry=registry)

    def watch_queue(self, queued: Callable[[], tuple[int, int]]) -> None:
        """Read the queue's length whenever the metrics are asked for."""
        for name, what, index in (("requests", "Requests that wait", 0), ("tokens", "Tokens that wait", 1)):
            gauge = Gauge(f"rlalign_queued_{name}", what, registry=self.registry)
            gauge.set_function(lambda index=index: queued()[index])

    def batch(self, *, requests: int, tokens: int, seconds: float) -> None:
        """One batch has run."""
        self._batch_requests.observe(requests)
        self._batch_tokens.observe(tokens)
        self._batch_seconds.observe(seconds)

    def calibration(self, calibration_id: str) -> None:
        """Another calibration is in force."""
        self._calibration.info({"calibration_id": calibration_id})

    def answered(self, *, path: str, status: int, seconds: float) -> None:
        """One request has been answered. path: the route's template, never what the client wrote."""
        self.requests.labels(path=path, status=str(status)).inc()
        self.seconds.labels(path=path).observe(seconds)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
