"""The monitor inside a run: its rules follow the configuration, its actions are carried out, its self-test can fail."""

from pathlib import Path

import pytest

from rlalign.config import load
from rlalign.mismatch.monitor import Action
from rlalign.run.limits import Watch, rules_of, self_test
from rlalign.run.parties import MismatchLimitError
from rlalign.types import LogprobSpec


class Log:
    def __init__(self):
        self.events, self.said, self.saved = [], [], []

    def event(self, kind, message):
        self.events.append((kind, message))


def config(tmp_path, **mismatch):
    return load({"model": {"path": "x"}, "task": {"name": "x"}, "output_dir": str(tmp_path), "mismatch": mismatch})


def watch(tmp_path, **mismatch):
    log = Log()
    spec = LogprobSpec(head_dtype="float32")
    return log, Watch(
        config(tmp_path, **mismatch),
        spec=spec,
        trainer_head="float32",
        floor=None,
        log=log,
        say=log.said.append,
        checkpoint=log.saved.append,
    )


def metrics(k3):
    return {"mismatch/lag0/k3": k3, "mismatch/nonfinite": 0.0, "train/lr": 1e-6}


RULE = {"metric": "mismatch/lag0/k3", "limit": 1e-3, "window": 2}


@pytest.mark.parametrize(("action", "saves"), [("stop", 0), ("checkpoint+stop", 1)])
def test_a_rule_that_stops_does_so_after_its_window(tmp_path, action, saves):
    log, watching = watch(tmp_path, rules=[RULE | {"action": action}])
    watching.step(0, metrics(1.0))
    with pytest.raises(MismatchLimitError, match=r"step 1: mismatch/lag0/k3 = 1 over 2 steps"):
        watching.step(1, metrics(1.0))
    assert len(log.saved) == saves and (saves == 0 or log.saved[0] == Path(tmp_path) / "checkpoint-alert")
    assert log.events[0][0] == f"alert/{action}"


def test_a_rule_that_warns_goes_on_and_is_written_down(tmp_path):
    log, watching = watch(tmp_path, rules=[RULE])
    for step in range(6):
        watching.step(step, metrics(1.0))
    assert len(log.events) == len(log.said) == 1
    assert "Confirm: rlalign" in log.said[0]


def test_default_rules_use_the_runs_own_limit_and_never_stop_a_run_that_only_warns(tmp_path):
    (k3,) = [r for r in rules_of(config(tmp_path, k3_limit=7e-4)) if r.metric == "mismatch/lag0/k3"]
    assert k3.limit == 7e-4 and k3.action is Action.checkpoint_stop
    warning = rules_of(config(tmp_path, action="warn"))
    assert not {Action.stop, Action.checkpoint_stop} & {r.action for r in warning}


def test_unknown_actions_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mismatch\.rules\.action='explode': choose one of log, warn"):
        config(tmp_path, rules=[RULE | {"action": "explode"}])


def rows(values):
    return [{"mismatch/lag0/k3": v} for v in values]


def test_the_self_test_needs_a_frozen_run_and_enough_steps():
    assert self_test(rows([1e-9] * 20), learning_rate=1e-6) is None
    assert self_test(rows([1e-9] * 3), learning_rate=0.0)["flat"] is None
    assert self_test(rows([1e-9, 1.1e-9, 0.9e-9] * 6), learning_rate=0.0)["flat"] is True


def test_a_mismatch_that_climbs_in_a_frozen_run_accuses_weight_sync():
    climbing = [1e-9 * 1.5**i for i in range(20)]
    with pytest.raises(RuntimeError, match="learning rate 0 failed.*weight"):
        self_test(rows(climbing), learning_rate=0.0)


def test_any_logged_key_can_have_a_rule_such_as_the_version_lag(tmp_path):
    rule = {"metric": "staleness/policy/max", "limit": 4, "window": 1, "action": "stop"}
    _, watching = watch(tmp_path, rules=[rule])
    watching.step(0, metrics(0.0) | {"staleness/policy/max": 4.0})
    with pytest.raises(MismatchLimitError, match="step 1: staleness/policy/max = 5"):
        watching.step(1, metrics(0.0) | {"staleness/policy/max": 5.0})
