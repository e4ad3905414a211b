"""Sampling ahead with a real engine in a process of its own: versions, resume to the bit, signals, and an engine that is killed."""

import json
import os
import re
import signal
import threading
import time

import pytest

from rlalign.config import compose, load
from rlalign.exits import Preempted
from rlalign.run import assembly
from rlalign.run.sampler import Sampler
from rlalign.run.train import train
from rlalign.tasks import Task
from rlalign.tracking.timeline import read_timeline

STEPS = 4
TIMED = re.compile(r"^time/|seconds|_per_s")
SMALL = [
    "schedule.mode=one_step_off", "schedule.probe_every=2", "schedule.probe_prompts=2", "model.dtype=float32", "algo=tis",
    "rollout.prompts_per_step=4", "rollout.group_size=4", "task.train_size=32", "task.eval_size=8", "tracking=off",
    "mismatch.head_every=2", f"steps={STEPS}",
]  # fmt: skip


def configured(folder, directory, *overrides):
    return load(compose("demo", [f"model.path={folder}", f"output_dir={directory}", *SMALL, *overrides]))


@pytest.fixture(scope="module")
def engine(untied, tmp_path_factory):
    """One engine for every run here; each begins by publishing its own weights."""
    found = assembly.start_engine(untied, configured(untied, tmp_path_factory.mktemp("unused")))
    yield found
    found.close()


@pytest.fixture
def run(untied, engine, monkeypatch):
    close = engine.close
    monkeypatch.setattr(engine, "close", lambda: None)
    monkeypatch.setattr(assembly, "start_engine", lambda model, config, say: engine)
    monkeypatch.setattr(Task, "reward", lambda self, prompt, completion: float(len(completion) % 2))
    yield lambda directory, *overrides: train(configured(untied, directory, *overrides))
    monkeypatch.setattr(engine, "close", close)


def rows(directory):
    """The last row of every step, without what a clock wrote."""
    found = {}
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found[row["step"]] = {k: v for k, v in row.items() if not TIMED.search(k)}
    return found


def test_one_step_off_overlaps_and_a_resume_after_a_signal_equals_the_run_that_went_through(run, tmp_path, monkeypatch):
    summary = run(tmp_path / "whole")
    whole = rows(tmp_path / "whole")
    assert [whole[s]["staleness/policy/max"] for s in range(STEPS)] == [0.0, 1.0, 1.0, 1.0]
    assert [whole[s]["rollout/policy_version"] for s in range(STEPS)] == [0, 0, 1, 2]
    assert [s for s in range(STEPS) if "mismatch/lag0/k3" in whole[s]] == [0, 2]
    assert max(whole[s]["mismatch/lag0/k3"] for s in (0, 2)) < 1e-9 < whole[3]["staleness/k3"]
    assert summary["mismatch"]["lag0"]["k3"] < 1e-9
    spans = {(s.phase, s.step): s for s in read_timeline(tmp_path / "whole" / "timeline.jsonl") if s.phase != "rollout"}
    ahead = [s for s in read_timeline(tmp_path / "whole" / "timeline.jsonl") if s.phase == "rollout" and s.step == 2]
    assert min(s.start for s in ahead) < spans["train", 1].start, "step 2 was not sampled beside the training of step 1"

    run_ahead = Sampler.run_ahead

    def with_a_signal(self, step):
        run_ahead(self, step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)  # while step 2 is being sampled

    monkeypatch.setattr(Sampler, "run_ahead", with_a_signal)
    with pytest.raises(Preempted, match="SIGUSR1: step 1 is finished and saved"):
        run(tmp_path / "cut", "checkpoint.resume=auto")
    monkeypatch.setattr(Sampler, "run_ahead", run_ahead)
    run(tmp_path / "cut", "checkpoint.resume=must")
    assert rows(tmp_path / "cut") == whole


def test_an_error_in_training_does_not_wait_for_the_generation_beside_it(run, engine, tmp_path, monkeypatch):
    from rlalign.objective import choice

    real = choice.policy_loss
    monkeypatch.setattr(choice, "policy_loss", lambda logprobs_BL, *a, **k: real(logprobs_BL * float("nan"), *a, **k))
    with pytest.raises(RuntimeError, match="the loss is nan"):
        run(tmp_path / "run")


def test_an_engine_killed_while_it_samples_is_named_instead_of_waited_for(engine):
    (process,) = engine._processes._processes
    os.kill(process.pid, signal.SIGSTOP)  # it will never answer
    threading.Timer(0.5, lambda: os.kill(process.pid, signal.SIGKILL)).start()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"the rollout engine died.*pid {process.pid}\) ended with code -9"):
        engine.generate([[1, 40]], prompt_ids=[0], samples=2, seed=0)
    assert time.monotonic() - began >= 0.5


@pytest.fixture
def as_late_as_it_may(monkeypatch):
    """Sampling ahead starts right before the publish, so that requests are running when the weights change."""
    take, run_ahead, before_publish, steps = Sampler.take, Sampler.run_ahead, Sampler.before_publish, []

    def alone(self, step):
        steps.append(step)
        self._in_flight = False
        sampled = take(self, step)
        self._in_flight = True
        return sampled

    def late(self):
        run_ahead(self, steps[-1])
        time.sleep(0.4)
        before_publish(self)

    monkeypatch.setattr(Sampler, "take", alone)
    monkeypatch.setattr(Sampler, "run_ahead", lambda self, step: None)
    monkeypatch.setattr(Sampler, "before_publish", late)


def test_weights_change_in_flight_on_servers_and_each_lag_is_measured_apart(
    two_servers, untied, tmp_path, monkeypatch, as_late_as_it_may
):
    monkeypatch.setattr(Task, "reward", lambda self, prompt, completion: float(len(completion) % 2))
    options = [
        "schedule.mode=in_flight", "steps=3", "mismatch.head_every=0", "rollout.backend=server", "rollout.max_tokens=200",
        f"rollout.servers=[{','.join(two_servers.urls)}]", "rollout.max_model_len=256", "rollout.max_num_seqs=16",
    ]  # fmt: skip
    train(configured(untied, tmp_path / "run", *options))
    found = rows(tmp_path / "run")
    assert sorted(found) == [0, 1, 2]
    for row in (found[1], found[2]):  # tokens of both versions, in the same sequences
        assert row["mismatch/lag0/tokens"] > 0 and row["mismatch/lag1/tokens"] > 0
        assert row["mismatch/lag0/k3"] < 1e-9 < row["mismatch/lag1/k3"] == row["staleness/k3"]
        assert row["staleness/kv/mean"] == row["staleness/policy/mean"], "keys were not recomputed"
