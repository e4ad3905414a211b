"""Sampling ahead: what may overlap, what may not, which version sampled what, and how failures and resumes come through."""

import json
import re
import threading
from array import array
from dataclasses import replace

import pytest

from rlalign.mismatch.monitor import Monitor, Rule
from rlalign.run.limits import rules_of
from rlalign.run.parties import MismatchLimitError, StalenessLimitError
from rlalign.run.sampler import STATE, Sampler
from rlalign.run.step import train_step
from rlalign.run.step_metrics import lags_of
from tests.async_parties import STEP, Engine, Trainer, config, waited
from tests.fakes import parties

TIMED = re.compile(r"^time/|seconds|_per_s")


def start(tmp_path, run, *, version=0, **engine):
    events = []
    engine = Engine(events, policy_version=version, **engine)
    p = parties(tmp_path, engine=engine, trainer=Trainer(events, version=version))
    sampler = Sampler(p, run, engine=lambda: engine, say=lambda message: events.append(("said", message)))
    return events, engine, p, sampler


def rows(p, run, sampler, steps):
    """Metrics of these steps without what a clock wrote."""
    found = []
    for step in steps:
        metrics = train_step(step, p, run, sampler).metrics
        found.append({k: v for k, v in metrics.items() if not TIMED.search(k)})
    return found


def test_one_step_off_samples_the_next_step_while_this_one_trains_and_publishes_after_it(tmp_path):
    run = config("one_step_off", steps=3)
    trained, changing, changed = [threading.Event() for _ in range(4)], threading.Event(), []

    def not_before_the_step_before_it_is_trained(seed):
        if seed > 0:
            changing.clear()
            waited(trained[seed - 1])
            changed.append(changing.wait(0.2))

    events, engine, p, sampler = start(tmp_path, run, before=not_before_the_step_before_it_is_trained)
    suspend = engine.suspend
    engine.suspend = lambda reason: (changing.set(), suspend(reason))
    step_of = p.trainer.optim_step
    p.trainer.optim_step = lambda: (step_of(), trained[p.trainer.version - 1].set(), {"lr": 0.0})[-1]
    lags = [m["staleness/policy/max"] for m in rows(p, run, sampler, range(3))]
    assert lags == [0.0, 1.0, 1.0]
    assert [v for name, v in events if name == "generate"] == [0, 0, 1], "the last step has no step after it"
    assert changed == [False, False], "weights changed under a running generation"


def test_in_flight_publishes_under_running_requests_and_never_runs_further_ahead_than_max_lag(tmp_path):
    run = config("in_flight", steps=6, schedule={"max_lag": 2})
    published = [threading.Event() for _ in range(7)]
    running, most, started = set(), [], []
    lock = threading.Lock()

    def until_a_publish_came_in_between(seed):
        with lock:
            running.add(seed)
            most.append(len(running))
            started.append((seed, engine.policy_version))
        if seed > 0:  # not done before the step before it is published: every one of them sees its weights change
            waited(published[seed])
        with lock:
            running.discard(seed)

    _, engine, p, sampler = start(tmp_path, run, before=until_a_publish_came_in_between)
    acknowledge = engine.acknowledge
    engine.acknowledge = lambda version: (acknowledge(version), published[version].set())
    rows(p, run, sampler, range(6))
    assert all(step - version <= 2 for step, version in started)
    assert sorted(step for step, _ in started) == list(range(6)) and max(most) >= 2


def test_older_tokens_than_the_schedule_allows_and_newer_ones_than_the_trainer_are_refused(tmp_path):
    run = config("one_step_off")
    for stamp, said in (
        (0, r"\[3\] versions behind trainer version 3; expected 0 to 1"),
        (9, r"\[-6\] versions behind"),
    ):
        _, _, p, sampler = start(tmp_path, run, version=3, stale_stamp=stamp)
        with pytest.raises(RuntimeError, match=said):
            train_step(0, p, run, sampler)


def test_a_token_of_the_new_version_over_keys_of_an_old_one_counts_as_old(tmp_path):
    run = config("one_step_off")
    _, _, p, sampler = start(tmp_path, run)
    batch = train_step(0, p, run, sampler).batch
    aged = replace(batch, policy_version_BL=batch.policy_version_BL + 2 * batch.loss_mask_BL)
    assert lags_of(aged, 2, allowed=2)[batch.loss_mask_BL].unique().tolist() == [2]
    unknown = replace(aged, kv_version_BL=batch.kv_version_BL.fill_(-1))
    assert lags_of(unknown, 2, allowed=2)[batch.loss_mask_BL].unique().tolist() == [0]


def test_probes_measure_the_engine_and_staleness_is_never_called_mismatch(tmp_path):
    run = config("one_step_off", steps=7, schedule={"probe_every": 3, "probe_prompts": 2})
    _, _, p, sampler = start(tmp_path, run)
    found = rows(p, run, sampler, range(7))
    assert [step for step, m in enumerate(found) if "mismatch/lag0/k3" in m] == [0, 3, 6]
    assert all(m["mismatch/lag0/k3"] == pytest.approx(0.0, abs=1e-12) for m in found[::3])
    moved = STEP**2 / 2 + STEP**3 / 6  # k3 of versions that differ by STEP nats everywhere
    assert all(m["staleness/k3"] == m["mismatch/lag1/k3"] == pytest.approx(moved, rel=1e-2) for m in found[1:])
    assert found[3]["mismatch/lag0/tokens"] == 2 * 3 and found[3]["mismatch/lag1/tokens"] == 16 * 3


def test_each_limit_stops_for_its_own_reason(tmp_path):
    tight = {"probe_every": 2, "k3_limit": 1e-3}
    _, _, p, sampler = start(tmp_path, run := config("one_step_off", schedule=tight))
    train_step(0, p, run, sampler)
    with pytest.raises(
        StalenessLimitError, match=r"step 1: staleness k3 = 0.00517.*schedule.k3_limit = 0.001.*1 versions old"
    ):
        train_step(1, p, run, sampler)
    run = config("one_step_off", mismatch={"k3_limit": 1e-6}, schedule={"probe_every": 2})
    _, engine, p, sampler = start(tmp_path, run)
    rows(p, run, sampler, range(2))
    real = engine.generate
    engine.generate = lambda *a, **k: [_shifted(r) for r in real(*a, **k)]
    with pytest.raises(MismatchLimitError, match=r"step 2: mismatch k3 = .*mismatch.k3_limit = 1e-06"):
        train_step(2, p, run, sampler)


def _shifted(rollout):
    logprobs = [x + 0.01 * masked for x, masked in zip(rollout.rollout_logprobs, rollout.loss_mask, strict=True)]
    return replace(rollout, rollout_logprobs=logprobs)


@pytest.mark.parametrize("mode", ["one_step_off", "in_flight"])
def test_a_failure_in_the_background_ends_the_step_with_its_own_message(tmp_path, mode):
    def fails_at_step_1(seed):
        if seed == 1:
            raise ConnectionError("server 2 hung up")

    run = config(mode)
    events, _, p, sampler = start(tmp_path, run, before=fails_at_step_1)
    with pytest.raises(ConnectionError, match="server 2 hung up"):
        rows(p, run, sampler, range(2))
    assert [v for name, v in events if name == "acknowledge"] in ([], [1])


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path):
    run = config("one_step_off", steps=5, schedule={"probe_every": 2})
    _, _, p, sampler = start(tmp_path, run)
    whole = rows(p, run, sampler, range(5))
    _, _, p, sampler = start(tmp_path, run)
    rows(p, run, sampler, range(2))
    sampler.save_state(tmp_path)
    assert [r["step"] for r in json.loads((tmp_path / STATE).read_text())["ready"]] == [2]
    _, _, p, sampler = start(tmp_path, run, version=2)
    sampler.load_state(tmp_path)
    assert rows(p, run, sampler, range(2, 5)) == whole[2:]


def test_batches_in_flight_at_a_checkpoint_are_named_and_sampled_again(tmp_path):
    run, release = config("in_flight", steps=4, schedule={"max_lag": 2}), threading.Event()
    _, _, p, sampler = start(tmp_path, run, before=lambda seed: seed < 2 or waited(release))
    rows(p, run, sampler, range(1))
    sampler.take(1)
    sampler.save_state(tmp_path)
    assert json.loads((tmp_path / STATE).read_text()) == {"ready": [], "again": [2, 3]}
    release.set()
    events, _, p, again = start(tmp_path, run, version=2)
    again.load_state(tmp_path)
    assert any(name == "said" and message.startswith("steps [2, 3] were being sampled") for name, message in events)
    assert [m["staleness/policy/max"] for m in rows(p, run, again, range(2, 4))] == [0.0, 1.0]


def test_settings_that_mean_nothing_together_are_refused():
    with pytest.raises(ValueError, match=r"schedule.max_lag=2 with schedule.mode=one_step_off: only in_flight"):
        config("one_step_off", schedule={"max_lag": 2})
    with pytest.raises(ValueError, match=r"in_flight with rollout.backend=embedded: only servers"):
        config("in_flight", rollout={"backend": "embedded", "servers": []})
    with pytest.raises(ValueError, match=r"tracking.replay_every=1 with schedule.mode=one_step_off"):
        config("one_step_off", tracking={"replay_every": 1})
    with pytest.raises(
        ValueError, match=r"schedule.mode=one_step_off without algo.correction: .*schedule.uncorrected=true"
    ):
        config("one_step_off", algo={})
    assert config("one_step_off", algo={}, schedule={"uncorrected": True}).algo.correction.off
    assert config("synchronous").algo.correction.off


def test_rules_on_the_mismatch_judge_probes_where_only_these_measure_it():
    every = {r.metric: r.every for r in rules_of(config("one_step_off", schedule={"probe_every": 7}))}
    assert every["mismatch/lag0/k3"] == 7 and every["correction/masked_share"] == 1
    assert {r.every for r in rules_of(config("synchronous"))} == {1}
    monitor = Monitor([Rule(metric="mismatch/lag0/k3", limit=1.0, window=2, every=3)])
    alerts = [
        a for step in range(20) for a in monitor.observe(step, {"mismatch/lag0/k3": 0.0} if step % 3 == 0 else {})
    ]
    assert alerts == []
    (absent,) = [a for step in range(20, 40) for a in monitor.observe(step, {})]
    assert absent.unjudged and "not been reported for 6 steps" in absent.message()


def test_captured_sets_come_through_a_checkpoint(tmp_path):
    run = config("one_step_off", steps=3)
    _, engine, p, sampler = start(tmp_path, run)
    plain = engine.generate

    def with_sets(*asked, **named):
        kept = {"kept_ids": array("i", [4, 5, 6, 7]), "kept_counts": array("q", [2, 1, 1])}
        return [replace(rollout, **kept) for rollout in plain(*asked, **named)]

    engine.generate = with_sets
    rows(p, run, sampler, range(1))
    sampler.settle()
    sampler.save_state(tmp_path)
    _, _, _, again = start(tmp_path, run, version=1)
    again.load_state(tmp_path)
    assert again.take(1).rollouts == sampler.take(1).rollouts
