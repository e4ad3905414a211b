"""Alerts: windows, hysteresis, actions, and causes in the order the evidence gives."""

import math

import pytest

from rlalign.mismatch.causes import Evidence, drift, frozen_run_verdict, likely_causes
from rlalign.mismatch.monitor import DEFAULT_RULES, Action, Monitor, Rule

K3 = "mismatch/lag0/k3"


def feed(monitor, values, metric=K3):
    """(step, cleared) of every alert."""
    return [(a.step, a.cleared) for step, v in enumerate(values) for a in monitor.observe(step, {metric: v})]


def rule(**changes):
    return Rule(**({"metric": K3, "limit": 0.01, "release": 0.005, "window": 3} | changes))


def test_an_alert_needs_most_of_a_full_window():
    assert feed(Monitor([rule()]), [0.0, 0.5, 0.0, 0.0, 0.5, 0.0]) == []
    assert feed(Monitor([rule()]), [0.5, 0.5]) == []
    assert feed(Monitor([rule()]), [0.0, 0.5, 0.5]) == [(2, False)]


def test_hysteresis_gives_one_alert_for_one_episode():
    values = [0.02] * 3 + [0.009, 0.011] * 10 + [0.001] * 3 + [0.02] * 3
    assert feed(Monitor([rule()]), values) == [(2, False), (24, True), (27, False)]


def test_without_a_release_the_limit_is_where_it_clears():
    assert feed(Monitor([rule(release=None, window=1)]), [0.02, 0.009, 0.02]) == [(0, False), (1, True), (2, False)]


def test_a_rule_below_a_limit():
    pearson = rule(metric="p", limit=0.98, release=0.99, above=False, window=1)
    assert feed(Monitor([pearson]), [0.999, 0.97, 0.985, 0.995], "p") == [(1, False), (3, True)]


def test_nan_is_past_every_limit_and_never_clears():
    assert feed(Monitor([rule()]), [math.nan] * 5) == [(2, False)]
    assert feed(Monitor([rule(above=False, limit=0.5, release=0.6)]), [math.nan] * 3) == [(2, False)]


def test_an_absent_metric_is_reported_once_and_not_judged():
    monitor = Monitor([rule()])
    seen = [monitor.observe(step, {}) for step in range(6)]
    assert [len(s) for s in seen] == [0, 0, 1, 0, 0, 0]
    assert seen[2][0].action is Action.warn and "cannot be judged" in seen[2][0].message()


def test_actions_are_the_rules_and_mild_when_it_clears():
    monitor = Monitor([rule(window=1, action=Action.checkpoint_stop)])
    (tripped,), (cleared,) = monitor.observe(0, {K3: 1.0}), monitor.observe(1, {K3: 0.0})
    assert tripped.action == "checkpoint+stop" and cleared.action is Action.log
    assert "over 0.01" in tripped.message() and "Confirm: " in tripped.message() and "no longer" in cleared.message()


@pytest.mark.parametrize(
    "changes", [{"window": 0}, {"release": 0.02}, {"above": False, "release": 0.005}, {"limit": math.nan}]
)
def test_rules_that_mean_nothing_are_refused(changes):
    with pytest.raises(ValueError, match="monitor rule"):
        rule(**changes)


def test_default_rules_are_quiet_on_a_healthy_bf16_run():
    healthy = {"k3": 4e-4, "k3_trimmed": 3e-4, "p99": 0.09, "ess": 0.999, "pearson_prob": 0.996}
    metrics = {f"mismatch/lag0/{n}": v for n, v in healthy.items()}
    metrics |= {"mismatch/nonfinite": 0.0, "correction/masked_share": 0.01}
    monitor = Monitor()
    assert {r.metric for r in DEFAULT_RULES} == metrics.keys()
    assert [a for step in range(20) for a in monitor.observe(step, metrics)] == []
    for name, bad in [("k3", 0.1), ("p99", 2.0), ("ess", 0.1), ("pearson_prob", 0.9)]:
        monitor = Monitor()
        alerts = [a for step in range(9) for a in monitor.observe(step, metrics | {f"mismatch/lag0/{name}": bad})]
        assert [a.rule.metric for a in alerts] == [f"mismatch/lag0/{name}"]


BASE = {"mismatch/lag0/k3": 0.02, "mismatch/lag0/p50": 0.01, "mismatch/lag0/over_1": 0.0, "mismatch/lag0/abs_max": 0.9}
CAUSES = [
    ({}, Evidence(rollout_head="float32", trainer_head="bfloat16"), "one-sided head", "rlalign parity"),
    ({}, Evidence(processed=False, rollout_temperature=0.7), "raw against processed logprobs", "rlalign doctor"),
    ({}, Evidence(rollout_temperature=0.7, trainer_temperature=1.0), "temperature", "rlalign doctor"),
    ({}, Evidence(truncated=True), "truncation", "rlalign doctor"),
    ({"mismatch/lag0/k1": 0.05, "mismatch/lag0/log_ratio_max": 0.001}, Evidence(), "truncation", "rlalign doctor"),
    ({}, Evidence(publish_verified=False), "stale weights", "rlalign doctor"),
    ({}, Evidence(prefix_cache_reset=False), "prefix cache after sync", "rlalign doctor"),
    ({"mismatch/lag0/position0/k3": 0.1, "mismatch/lag0/position9/k3": 0.01}, Evidence(), "prefix cache after sync",
     "rlalign parity --noise-floor"),
    ({"mismatch/lag0/over_1": 0.001, "mismatch/lag0/abs_max": 9.0}, Evidence(), "tokenisation round trip",
     "rlalign mismatch on the step's token file"),
    ({}, Evidence(retokenized=3), "tokenisation round trip", "rlalign doctor"),
    ({}, Evidence(k3_by_rank={0: 1e-3, 1: 1e-3, 2: 9e-3}), "one engine rank differs", "rlalign doctor"),
    ({}, Evidence(floor_k3=0.015), "noise floor", "rlalign parity --noise-floor"),
    ({}, Evidence(), "numerical difference", "rlalign parity --noise-floor"),
]  # fmt: skip


@pytest.mark.parametrize("metrics, evidence, name, command", CAUSES)
def test_the_first_cause_is_the_one_the_evidence_names(metrics, evidence, name, command):
    causes = likely_causes(BASE | metrics, evidence)
    assert (causes[0].name, causes[0].command) == (name, command)
    assert [c.score for c in causes] == sorted((c.score for c in causes), reverse=True)


def test_proof_comes_before_resemblance():
    looks_like_tokens = BASE | {"mismatch/lag0/over_1": 0.001, "mismatch/lag0/abs_max": 9.0}
    names = [c.name for c in likely_causes(looks_like_tokens, Evidence(rollout_head="model", trainer_head="float32"))]
    assert names == ["one-sided head", "tokenisation round trip", "numerical difference"]


def test_what_the_run_has_ruled_out_is_not_named():
    ruled_out = Evidence(
        rollout_head="float32", trainer_head="float32", processed=True, truncated=False, rollout_temperature=1.0,
        trainer_temperature=1.0, prefix_cache_reset=True, publish_verified=True, retokenized=0,
    )  # fmt: skip
    suspicious = BASE | {"mismatch/lag0/over_1": 0.001, "mismatch/lag0/abs_max": 9.0, "mismatch/lag0/position0/k3": 1.0}
    assert [c.name for c in likely_causes(suspicious, ruled_out)] == ["numerical difference"]


def test_a_frozen_run_that_drifts_names_weight_sync():
    noise = [1e-4 * (1 + 0.1 * ((7 * i) % 5)) for i in range(40)]
    rising = [x * (1 + i / 10) for i, x in enumerate(noise)]
    assert frozen_run_verdict(noise) is None
    assert frozen_run_verdict(rising).name == "weight sync"
    named = likely_causes(BASE, Evidence(learning_rate=0.0), k3_history=rising)
    assert named[0].name == "weight sync"
    assert likely_causes(BASE, Evidence(learning_rate=1e-6), k3_history=rising)[0].name == "stale weights"
    with pytest.raises(ValueError, match="at least 9"):
        drift(noise[:8])


def test_a_monitor_remembers_the_drift_it_saw():
    monitor = Monitor([rule(window=1)])
    alerts = [a for i in range(40) for a in monitor.observe(i, {K3: 3e-4 * (i + 1)})]
    assert alerts[0].causes[0].name == "stale weights"


def test_truncation_is_a_cause_until_the_sets_are_shared_and_then_only_where_they_differ():
    biased = {"mismatch/lag0/k1": 0.2, "mismatch/lag0/k3": 0.02, "mismatch/lag0/log_ratio_max": 0.0}
    first = likely_causes(biased, Evidence(truncated=True, processed=True))[0]
    assert first.name == "truncation" and "k1 0.2 is what a kept mass of 0.819 costs" in first.why
    shared = Evidence(truncated=True, replayed=True, processed=True)
    assert "truncation" not in [c.name for c in likely_causes(biased, shared)]
    apart = biased | {"support/outside": 0.03, "support/differ": 0.2}
    (found,) = [c for c in likely_causes(apart, shared) if c.name == "kept sets differ"]
    assert "3.00% of tokens" in found.why and "20.00% of captured sets" in found.why
