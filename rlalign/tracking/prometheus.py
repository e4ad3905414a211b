"""GET /metrics while a run lives: the last value of every metric as a gauge, and counters of steps, tokens, publishes, events.

Names follow Prometheus's rules: rlalign_ + the key with _ for every other character. Phases are one family with a label.
"""

from __future__ import annotations

import math
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from rlalign.tracking.backends import Cell

if TYPE_CHECKING:
    import numpy as np

PHASE = re.compile(r"time/(.+)_s")
COUNTED = {"rollout/tokens": "rlalign_tokens", "publish/bytes": "rlalign_publish_bytes"}
HELP = {
    "rlalign_tokens": "Sampled tokens of the steps logged by this process.",
    "rlalign_publish_bytes": "Bytes of weights published by this process.",
    "rlalign_steps": "Steps logged by this process.",
    "rlalign_publishes": "Versions of the policy published by this process.",
}


class Endpoint:
    """The HTTP server of a run, on its first rank. Counters start at zero with every process, as Prometheus expects."""

    def __init__(self, *, host: str, port: int, run: Mapping[str, str]) -> None:
        """run: name, project and the like, in rlalign_run_info. Raises ValueError where the port cannot be had."""
        self._state = _State(run)
        registry = CollectorRegistry()
        registry.register(self._state)
        ProcessCollector(registry=registry)
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise ValueError(
                f"tracking.prometheus_port={port}: cannot listen on {host}:{port} of {socket.gethostname()} ({error}). Another run "
                "of this machine may have it: choose another port, or 0 for no endpoint"
            ) from error
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the row's values and add up what is counted."""
        self._state.log(step, metrics)

    def log_histogram(self, step: int, name: str, values: np.ndarray | Sequence[float]) -> None:
        """Not here: Prometheus's histograms count over time, ours are of one step."""

    def log_table(self, step: int, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        """Not here."""

    def event(self, step: int, kind: str, message: str) -> None:
        """Count it by kind."""
        self._state.event(kind)

    def about(self) -> dict[str, Cell]:
        """Where it listens."""
        return {"url": self.url}

    def finish(self, summary: dict, *, exit_code: int) -> None:
        """Stop answering and let go of the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _State:
    """What a scrape reads, from another thread than the run's."""

    def __init__(self, run: Mapping[str, str]) -> None:
        self._lock, self._run = threading.Lock(), dict(run)
        self._step, self._logged_at = -1, 0.0
        self._last: dict[str, float] = {}
        self._phase_totals: dict[str, float] = {}
        self._counts = dict.fromkeys(HELP, 0.0)
        self._events: dict[str, int] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._lock:
            self._step, self._logged_at = step, time.time()
            self._last |= metrics
            self._counts["rlalign_steps"] += 1
            self._counts["rlalign_publishes"] += "publish/version" in metrics
            for key, name in COUNTED.items():
                self._counts[name] += _counted(metrics.get(key, 0.0))
            for phase, seconds in _phases(metrics).items():
                self._phase_totals[phase] = self._phase_totals.get(phase, 0.0) + _counted(seconds)

    def event(self, kind: str) -> None:
        with self._lock:
            self._events[kind] = self._events.get(kind, 0) + 1

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            families = [*self._progress(), *self._counters(), *self._gauges()]
        yield from families

    def describe(self) -> list[Metric]:
        return []  # names come and go with what is logged

    def _progress(self) -> Iterator[Metric]:
        yield InfoMetricFamily("rlalign_run", "Which run this is.", value=self._run)
        yield GaugeMetricFamily("rlalign_step", "Last step logged; -1 before the first.", value=self._step)
        told = "When that was, in seconds since 1970: a run that hangs stops here."
        yield GaugeMetricFamily("rlalign_last_step_timestamp_seconds", told, value=self._logged_at)
        version = self._last.get("publish/version", self._last.get("rollout/policy_version"))
        if version is not None:
            yield GaugeMetricFamily(
                "rlalign_policy_version", "Completed optimizer steps of what vLLM holds.", value=version
            )
        last = GaugeMetricFamily("rlalign_phase_last_seconds", "Seconds of a phase in the last step.", labels=["phase"])
        total = CounterMetricFamily("rlalign_phase_seconds", "Seconds of a phase over all steps.", labels=["phase"])
        for phase, seconds in _phases(self._last).items():
            last.add_metric([phase], seconds)
        for phase, seconds in self._phase_totals.items():
            total.add_metric([phase], seconds)
        yield from (last, total)

    def _counters(self) -> Iterator[Metric]:
        for name, value in self._counts.items():
            yield CounterMetricFamily(name, HELP[name], value=value)
        events = CounterMetricFamily("rlalign_events", "Alerts, repairs and failures by kind.", labels=["kind"])
        for kind, count in self._events.items():
            events.add_metric([kind], count)
        yield events

    def _gauges(self) -> Iterator[Metric]:
        """One family a name; keys that would share one are told apart by a label."""
        by_name: dict[str, dict[str, float]] = {}
        for key, value in self._last.items():
            if not PHASE.fullmatch(key):
                by_name.setdefault(gauge_name(key), {})[key] = value
        for name, values in by_name.items():
            shared = len(values) > 1
            family = GaugeMetricFamily(name, f"Last value of {', '.join(values)}.", labels=["key"] if shared else None)
            for key, value in values.items():
                family.add_metric([key] if shared else [], value)
            yield family


def gauge_name(key: str) -> str:
    """mismatch/lag0/k3 as rlalign_mismatch_lag0_k3; a name that one of the counters has gets _last."""
    name = "rlalign_" + re.sub(r"[^a-zA-Z0-9_]", "_", key)
    return f"{name}_last" if name in TAKEN or name.endswith(("_total", "_info")) else name


TAKEN = {
    *HELP,
    "rlalign_run",
    "rlalign_step",
    "rlalign_events",
    "rlalign_policy_version",
    "rlalign_last_step_timestamp_seconds",
}


def _counted(value: float) -> float:
    """What may be added to a counter: a NaN would stay in it for ever, and none may fall."""
    return value if math.isfinite(value) and value > 0 else 0.0


def _phases(metrics: Mapping[str, float]) -> dict[str, float]:
    return {found[1]: value for key, value in metrics.items() if (found := PHASE.fullmatch(key))}
