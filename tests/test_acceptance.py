"""An update whose weights widen the gap is taken back everywhere; one that does not is kept."""

from __future__ import annotations

import math

import pytest
import torch

from rlalign.config import load
from rlalign.run.observation import EVAL_SEED
from rlalign.run.sampler import PROBE_SEED, step_seed
from rlalign.run.step import ACCEPT_SEED, train_step
from tests.fakes import FakeEngine, FakePrompt, FakeTask, FakeTrainer, parties


class Trainer(FakeTrainer):
    """Whose state can be written down and brought back."""

    def optim_step(self):
        with torch.no_grad():
            self.weight += 0.125
        return super().optim_step()

    def _logprobs(self, batch):
        return super()._logprobs(batch) - self.weight.detach()  # the weight moves, the policy stays uniform

    def forward_backward(self, batch, loss_function):
        self.weight.grad = torch.zeros(1)
        self.events.append(("forward_backward", batch.num_tokens))
        return {}

    def save_state(self, folder):
        folder.mkdir(parents=True)
        torch.save((self.version, self.weight.detach()), folder / "state")

    def load_state(self, folder):
        self.version, weight = torch.load(folder / "state")
        self.weight.data.copy_(weight)


class Drifting(FakeEngine):
    """Disagrees with the trainer from one version on."""

    from_version, gap = 1, 0.5

    def generate(self, prompts, **asked):
        self.shift = self.gap if self.policy_version >= self.from_version else 0.0
        return super().generate(prompts, **asked)


class Task(FakeTask):
    def eval_prompts(self):
        return [FakePrompt(prompt_id=-1 - i, text="y") for i in range(4)]


def run(tmp_path, engine, **mismatch):
    base = {"model": {"path": "x"}, "task": {"name": "x"}, "rollout": {"prompts_per_step": 4, "group_size": 4}}
    config = load(base | {"output_dir": str(tmp_path / "run"), "mismatch": {"accept_k3": 1e-2} | mismatch})
    trainer = Trainer(engine.events)
    p = parties(tmp_path, engine=engine, trainer=trainer, task=Task())
    return trainer, train_step(0, p, config)


@pytest.mark.parametrize("gap", [0.5, math.nan])
def test_an_update_that_widens_the_gap_is_taken_back(tmp_path, gap):
    engine = Drifting([])
    engine.gap = gap
    trainer, result = run(tmp_path, engine)
    assert [version for name, version in engine.events if name == "acknowledge"] == [1, 0]
    assert trainer.version == engine.policy_version == 0 and trainer.weight.item() == 0.0
    assert result.metrics["accept/refused"] == 1.0 and "update refused" in result.warnings[0]
    assert not (tmp_path / "run" / "candidate").exists()


def test_an_update_that_does_not_is_kept(tmp_path):
    engine = Drifting([])
    engine.from_version = 2
    trainer, result = run(tmp_path, engine)
    assert [version for name, version in engine.events if name == "acknowledge"] == [1]
    assert trainer.version == 1 and trainer.weight.item() == 0.125
    assert result.metrics["accept/refused"] == 0.0 and result.metrics["accept/k3"] < 1e-9 and not result.warnings
    assert result.metrics["accept/tokens"] == 12.0


def test_without_a_limit_nothing_is_judged(tmp_path):
    trainer, result = run(tmp_path, Drifting([]), accept_k3=0.0)
    assert trainer.version == 1 and not any(name.startswith("accept/") for name in result.metrics)


def test_what_judges_an_update_is_drawn_from_seeds_of_its_own():
    """A hundred thousand steps of three runs: completions of the evaluation, of a probe or of a step judge no update."""
    base = {"model": {"path": "x"}, "task": {"name": "x"}}
    first = [step_seed(load(base | {"seed": seed}), 0) for seed in range(3)]
    judged, probed, trained = (
        {seed + step + offset for seed in first for step in range(100_000)} for offset in (ACCEPT_SEED, PROBE_SEED, 0)
    )
    assert EVAL_SEED not in judged and not judged & probed and not judged & trained


def test_where_an_update_cannot_be_taken_back_it_is_refused():
    base = {"model": {"path": "x"}, "task": {"name": "x"}, "mismatch": {"accept_k3": 1e-2}}
    with pytest.raises(ValueError, match="is not taken back with the policy"):
        load(base | {"algo": {"advantage": "gae"}})
