"""Fakes whose policies really differ between versions, and an engine that takes as long as a test wants."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from rlalign.config import load
from tests.fakes import VOCAB, FakeEngine, FakeTrainer

PATIENCE_S = 20.0  # after which a test that waits for another thread has failed
STEP = 0.1  # nats by which one version's logprobs differ from the next one's


def config(mode: str, *, steps: int = 4, **sections):
    schedule = {"mode": mode} | sections.pop("schedule", {})
    servers = {"backend": "server", "servers": ["http://127.0.0.1:1"]} if mode == "in_flight" else {}
    rollout = {"prompts_per_step": 4, "group_size": 4} | servers | sections.pop("rollout", {})
    algo = {} if mode == "synchronous" else {"correction": {"preset": "tis"}}
    base = {"algo": algo, "model": {"path": "x"}, "task": {"name": "x"}}
    return load(base | {"steps": steps, "schedule": schedule, "rollout": rollout} | sections)


@dataclass
class Engine(FakeEngine):
    """Samples under its version's own logprobs. before: called as each generation begins, with its seed."""

    before: Callable[[int], object] = lambda seed: None
    one: threading.Lock = field(default_factory=threading.Lock)

    def generate(self, prompts, *, prompt_ids, samples, seed):
        self.events.append(("begins", seed))
        if samples > 1:  # a probe has one
            self.before(seed)
        with self.one:
            version = self.policy_version if self.stale_stamp is None else self.stale_stamp
            self.shift = STEP * version
            rollouts = super().generate(prompts, prompt_ids=prompt_ids, samples=samples, seed=seed)
            self.events.append(("generated", version))
        return rollouts

    def acknowledge(self, version):
        with self.one:
            super().acknowledge(version)


class Trainer(FakeTrainer):
    """A version's logprobs are those of the engine of that version."""

    def _logprobs(self, batch):
        logprob = -torch.log(torch.tensor(float(VOCAB))) + STEP * self.version + 0.0 * self.weight
        return torch.where(batch.loss_mask_BL, logprob, 0.0)


def waited(event: threading.Event) -> None:
    assert event.wait(PATIENCE_S), "another thread never came that far"
