"""Sampler: the completions of coming steps, sampled while the trainer works on earlier ones.

Rank 0 starts a thread for each batch; only the main thread ever talks to other ranks. Generation for step n starts when the
weights of step n - schedule.max_lag are published, never earlier: nothing can become older than that, so nothing is thrown away.
"""

from __future__ import annotations

import json
import threading
import time
from array import array
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign import ranks
from rlalign.config import RunConfig, ScheduleMode
from rlalign.types import Rollout

if TYPE_CHECKING:
    from rlalign.run.parties import Parties, RolloutEngine

STATE = "rollouts.json"
PROBE_SEED = 2**19  # far from the seeds of steps and of evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The completions of one step. start: of their generation, seconds since 1970; seconds: how long it took."""

    step: int
    rollouts: list[Rollout]
    start: float
    seconds: float


def step_seed(config: RunConfig, step: int) -> int:
    """The seed of a step's rollouts: the same after a resume, and in a replay."""
    return config.seed * 1_000_003 + step


def request(step: int, parties: Parties, config: RunConfig) -> Callable[[RolloutEngine], Sampled]:
    """What sampling a step will ask of an engine; prompts are encoded now, in the calling thread."""
    prompts = parties.task.train_prompts(step, config.rollout.prompts_per_step)
    encoded, prompt_ids = [parties.encode(p.text) for p in prompts], [p.prompt_id for p in prompts]

    def ask(engine: RolloutEngine) -> Sampled:
        start, began = time.time(), time.perf_counter()
        rollouts = engine.generate(
            encoded, prompt_ids=prompt_ids, samples=config.rollout.group_size, seed=step_seed(config, step)
        )
        return Sampled(step=step, rollouts=rollouts, start=start, seconds=time.perf_counter() - began)

    return ask


def sample_probe(step: int, parties: Parties, config: RunConfig) -> list[Rollout]:
    """A few completions of the step's first prompts with the weights published last: what engine mismatch is measured on."""
    size = ranks.world_size()
    count = -(-config.schedule.probe_prompts // size) * size
    prompts = parties.task.train_prompts(step, config.rollout.prompts_per_step)[:count]
    return parties.sample(prompts, samples=1, seed=step_seed(config, step) + PROBE_SEED)


class Sampler:
    """Batches that are being sampled, or wait for their step. Every rank makes the same calls in the same order.

    What a thread raises, the next call that needs its batch raises, on every rank.
    """

    def __init__(
        self, parties: Parties, config: RunConfig, *, engine: Callable[[], RolloutEngine], say: Callable[[str], None]
    ) -> None:
        """engine: asked for on the first rank only; one whose `generate` may run in another thread than the trainer's.

        say: writes down what a reader of the run should know.
        """
        self._parties, self._config, self._engine, self._say = parties, config, engine, say
        if config.algo.correction.off:
            say("schedule.uncorrected: nothing corrects for tokens that older versions sampled")
        self._ahead = config.schedule.max_lag
        self._in_flight = config.schedule.mode is ScheduleMode.in_flight
        self._batches: dict[int, Future[Sampled]] = {}  # by step, on the first rank

    def take(self, step: int) -> Sampled:
        """The step's completions, as soon as they are there. Call it once a step, with the weights of `step` published."""

        def first() -> Sampled:
            self._start(range(step, step + 1 + (self._ahead if self._in_flight else 0)))
            sampled = self._batches[step].result()
            del self._batches[step]
            return sampled

        return ranks.on_first(first)

    def run_ahead(self, step: int) -> None:
        """Start what may be sampled with the weights of `step`. Call it after `take`, while these are the published ones."""
        ranks.on_first(lambda: self._start(range(step + 1, step + 1 + self._ahead)))

    def before_publish(self) -> None:
        """Wait for what is being sampled, so that no sequence gets two versions; in flight, only raise what has failed."""
        ranks.on_first(lambda: self._results(finished_only=self._in_flight))

    def settle(self) -> None:
        """Wait until nothing is being sampled."""
        ranks.on_first(lambda: self._results(finished_only=False))

    def save_state(self, folder: Path) -> None:
        """The batches that are ready. Those still being sampled are named: after a resume they are sampled again."""
        ready = [b.result() for b in self._batches.values() if b.done() and b.exception() is None]
        again = sorted(self._batches.keys() - {sampled.step for sampled in ready})
        (folder / STATE).write_text(
            json.dumps({"ready": [asdict(sampled) for sampled in ready], "again": again}, default=list)
        )

    def load_state(self, folder: Path) -> None:
        """Go on from `save_state`. The checkpoint of a synchronous run has no such state: the first batch is then sampled anew."""
        if not (folder / STATE).exists():
            return
        state = json.loads((folder / STATE).read_text())
        if again := state["again"]:
            self._say(f"steps {again} were being sampled at the checkpoint: they are sampled again, with its weights")
        for row in state["ready"]:
            rollouts = [_rollout(fields) for fields in row.pop("rollouts")]
            self._batches[row["step"]] = Future()
            self._batches[row["step"]].set_result(Sampled(rollouts=rollouts, **row))

    def _start(self, steps: range) -> None:
        for step in steps:
            if step in self._batches or step >= self._config.steps:
                continue
            batch: Future[Sampled] = Future()
            arguments = (request(step, self._parties, self._config), self._engine(), batch)
            # a daemon, since a run that ends does not wait for it: closing the engine ends what it waits for
            threading.Thread(target=_run, args=arguments, name=f"rollouts of step {step}", daemon=True).start()
            self._batches[step] = batch

    def _results(self, *, finished_only: bool) -> None:
        for batch in self._batches.values():
            if batch.done() or not finished_only:
                batch.result()


def _run(ask: Callable[[RolloutEngine], Sampled], engine: RolloutEngine, batch: Future[Sampled]) -> None:
    try:
        batch.set_result(ask(engine))
    except BaseException as error:  # raised again where the main thread asks for the batch
        batch.set_exception(error)


def _rollout(fields: dict) -> Rollout:
    spans = {name: [tuple(span) for span in fields[name]] for name in ("version_spans", "kv_spans", "turn_rewards")}
    kept = {"kept_ids": array("i", fields["kept_ids"]), "kept_counts": array("q", fields["kept_counts"])}
    wide = max(fields["experts"], default=0) > 255
    routes = {
        "experts": array("H" if wide else "B", fields["experts"]),
        "experts_shape": tuple(fields["experts_shape"]),
    }
    return Rollout(**fields | spans | kept | routes)
