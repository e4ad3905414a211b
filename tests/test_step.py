"""The step with fakes: order of events, version stamps, the gate, and what a failed publish leaves behind."""

import math
from dataclasses import replace

import pytest
import torch

from rlalign.config import GateAction, load
from rlalign.logprobs.truncation import Found
from rlalign.run.parties import MismatchLimitError
from rlalign.run.step import train_step
from rlalign.run.step_metrics import staleness_metrics
from rlalign.types import KeptSets, LogprobSpec, RolloutBatch
from tests.fakes import FakeEngine, FakeTask, FakeTrainer, parties


def config(**changes):
    base = {"model": {"path": "x"}, "task": {"name": "x"}, "rollout": {"prompts_per_step": 4, "group_size": 4}}
    return load(base | changes)


@pytest.fixture
def events():
    return []


def names(events):
    return [name for name, _ in events]


def test_generation_waits_for_the_acknowledgement_of_what_was_trained(tmp_path, events):
    p = parties(tmp_path, engine=FakeEngine(events), trainer=FakeTrainer(events))
    for step in range(2):
        train_step(step, p, config())
    publish = ["suspend", "load", "acknowledge"]
    assert names(events) == ["generate", "score", "forward_backward", "optim_step", *publish] * 2
    assert [version for name, version in events if name == "generate"] == [0, 1]
    assert [version for name, version in events if name == "acknowledge"] == [1, 2]


def test_weights_leave_no_files_behind(tmp_path, events):
    train_step(0, parties(tmp_path, engine=FakeEngine(events), trainer=FakeTrainer(events)), config())
    assert list(tmp_path.iterdir()) == []


def test_equal_engines_measure_zero_and_correct_nothing(tmp_path, events):
    result = train_step(0, parties(tmp_path, engine=FakeEngine(events), trainer=FakeTrainer(events)), config())
    assert result.metrics["mismatch/lag0/k3"] == pytest.approx(0.0, abs=1e-12)
    assert result.metrics["correction/weight_mean"] == 1.0
    assert result.metrics["correction/kept_frac"] == 1.0


def test_the_gate_stops_before_anything_is_trained(tmp_path, events):
    p = parties(tmp_path, engine=FakeEngine(events, shift=0.5), trainer=FakeTrainer(events))
    with pytest.raises(MismatchLimitError, match="k3 = 0.10.*mismatch.k3_limit = 0.01"):
        train_step(0, p, config())
    assert names(events) == ["generate", "score"]


def test_the_gate_can_warn_instead(tmp_path, events):
    p = parties(tmp_path, engine=FakeEngine(events, shift=0.5), trainer=FakeTrainer(events))
    result = train_step(0, p, config(mismatch={"action": GateAction.warn}))
    assert len(result.warnings) == 1 and "optim_step" in names(events)


def test_nan_passes_no_gate(tmp_path, events):
    p = parties(tmp_path, engine=FakeEngine(events, shift=math.nan), trainer=FakeTrainer(events))
    with pytest.raises(MismatchLimitError, match="48 not finite"):
        train_step(0, p, config())


def test_rollouts_of_an_older_version_are_not_called_lag_0(tmp_path, events):
    engine, trainer = FakeEngine(events, stale_stamp=0), FakeTrainer(events, version=3)
    result = train_step(0, parties(tmp_path, engine=engine, trainer=trainer), config())
    assert "mismatch/lag3/k3" in result.metrics and "mismatch/lag0/k3" not in result.metrics
    assert {k: v for k, v in result.metrics.items() if k.startswith("staleness/")} == {
        f"staleness/{of}/{stat}": 3.0 for of in ("policy", "kv") for stat in ("mean", "max")
    } | {"staleness/k3": 0.0}


def test_keys_older_than_the_policy_are_their_own_staleness_and_unknown_ones_are_not_zero():
    ids, masked = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[False, False, True, True]])
    batch = RolloutBatch(
        token_ids_BL=ids, attention_mask_BL=masked, loss_mask_BL=masked, rollout_logprobs_BL=ids.float(), prompt_id_B=ids[:, 0],
        group_id_B=ids[:, 0], policy_version_BL=torch.tensor([[-1, -1, 4, 5]]), kv_version_BL=torch.tensor([[-1, -1, 2, 4]]),
        spec=LogprobSpec(),
    )  # fmt: skip
    assert staleness_metrics(batch, 5, {}) == {
        "staleness/policy/mean": 0.5, "staleness/policy/max": 1.0, "staleness/kv/mean": 2.0, "staleness/kv/max": 3.0,
    }  # fmt: skip
    unknown = replace(batch, kv_version_BL=torch.tensor([[-1, -1, 2, -1]]))
    assert set(staleness_metrics(unknown, 5, {})) == {"staleness/policy/mean", "staleness/policy/max"}


def test_a_stamp_from_the_future_is_a_broken_contract(tmp_path, events):
    engine = FakeEngine(events, stale_stamp=7)
    with pytest.raises(RuntimeError, match=r"\[-7\] versions behind"):
        train_step(0, parties(tmp_path, engine=engine, trainer=FakeTrainer(events)), config())


def test_groups_of_identical_rewards_teach_nothing(tmp_path, events):
    trainer = FakeTrainer(events)
    result = train_step(
        0, parties(tmp_path, engine=FakeEngine(events), trainer=trainer, task=FakeTask(same=True)), config()
    )
    assert result.metrics["reward/frac_zero_std_groups"] == 1.0
    assert result.metrics["train/grad_norm"] == 0.0
    assert (result.advantages_BL == 0).all()


def test_a_failed_publish_leaves_an_engine_that_refuses_until_one_succeeds(tmp_path, events):
    engine = FakeEngine(events, problems=["lm_head.weight: the engine computes with something else"])
    p = parties(tmp_path, engine=engine, trainer=FakeTrainer(events))
    with pytest.raises(RuntimeError, match=r"version 1 failed: rank 0: lm_head.weight.*must not generate"):
        train_step(0, p, config())
    assert "acknowledge" not in names(events)
    with pytest.raises(RuntimeError, match="version 1 failed"):
        train_step(1, p, config())
    engine.problems = []
    p.publish(p.trainer.named_weights(), p.trainer.version)
    assert train_step(1, p, config()).metrics["publish/version"] == 2.0


def test_minibatches_are_separate_optimizer_steps_over_all_samples(tmp_path, events):
    p = parties(tmp_path, engine=FakeEngine(events), trainer=FakeTrainer(events))
    train_step(0, p, config(algo={"minibatches": 4}))
    assert names(events).count("optim_step") == 4
    assert sum(n for name, n in events if name == "forward_backward") == 16 * 3
    assert ("acknowledge", 4) in events


def test_seeds_differ_between_steps_and_repeat_between_runs(tmp_path):
    def tokens(step):
        return train_step(
            step, parties(tmp_path, engine=FakeEngine([]), trainer=FakeTrainer([])), config()
        ).batch.token_ids_BL

    assert (tokens(0) == tokens(0)).all() and not (tokens(0) == tokens(1)).all()


def test_the_phases_and_the_rest_add_up_to_the_step(tmp_path, events):
    found = train_step(0, parties(tmp_path, engine=FakeEngine(events), trainer=FakeTrainer(events)), config()).metrics
    times = {name: value for name, value in found.items() if name.startswith("time/")}
    whole = times.pop("time/step_s")
    assert sum(times.values()) == pytest.approx(whole) and 0 <= times["time/other_s"] < whole
    assert {"time/rollout_s", "time/reward_s", "time/score_s", "time/train_s", "time/publish_s"} <= times.keys()


def test_settings_that_no_trainer_repeats_stop_the_step(tmp_path, events):
    engine = FakeEngine(events, spec=LogprobSpec(repetition_penalty=1.1))
    with pytest.raises(ValueError, match="repetition_penalty=1.1, which change the engine's logprobs"):
        train_step(0, parties(tmp_path, engine=engine, trainer=FakeTrainer(events)), config())
    assert names(events) == ["generate"]


def test_tokens_whose_set_is_too_large_leave_the_loss_and_are_counted(tmp_path, events):
    class Trainer(FakeTrainer):
        too_large = 1

        def score_truncated(self, batch):
            mask_BL = batch.loss_mask_BL
            large_BL = torch.zeros_like(mask_BL)
            large_BL[: self.too_large] = mask_BL[: self.too_large]
            count_BL = (mask_BL & ~large_BL).long() * 2
            ids_E = torch.zeros(int(count_BL.sum()), dtype=torch.int32)
            none_BL, zero_BL = torch.zeros_like(mask_BL), torch.zeros(mask_BL.shape)
            found = Found(
                kept=KeptSets(ids_E=ids_E, count_BL=count_BL), log_mass_BL=zero_BL - 0.25, outside_BL=none_BL,
                compared_BL=none_BL, differ_BL=none_BL, differ_mass_BL=zero_BL, too_large_BL=large_BL,
            )  # fmt: skip
            return *self.score(batch), found

    spec = LogprobSpec(top_p=0.9)
    trainer = Trainer(events)
    result = train_step(0, parties(tmp_path, engine=FakeEngine(events, spec=spec), trainer=trainer), config())
    assert int(result.batch.loss_mask_BL.sum()) == 45 and not result.batch.loss_mask_BL[0].any()
    assert ("forward_backward", 45) in events
    m = {k: v for k, v in result.metrics.items() if k.startswith("support/")}
    assert m == {
        "support/size_mean": 2.0, "support/size_max": 2.0, "support/log_mass": -0.25, "support/outside": 0.0,
        "support/captured": 0.0, "support/too_large": 3 / 48,
    }  # fmt: skip
    trainer.too_large = 16
    with pytest.raises(RuntimeError, match="every token's kept set has more than 4096 ids"):
        train_step(
            0, parties(tmp_path, engine=FakeEngine(events, spec=spec, policy_version=1), trainer=trainer), config()
        )
