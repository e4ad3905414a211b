"""The step with a critic: who learns what and when, which tokens they learn from, and when the penalty moves."""

from dataclasses import dataclass, replace

import pytest
import torch

from rlalign.config import load
from rlalign.objective.reference_kl import KlController
from rlalign.reward.mixture import ComponentScore, RewardMixture
from rlalign.run.step import train_step
from rlalign.types import RewardScore
from tests.fakes import FakeEngine, FakeTrainer, parties


@dataclass
class FakeCritic:
    """One number for every token."""

    events: list
    seen: list
    weight: torch.Tensor

    def values(self, batch):
        self.events.append(("values", None))
        return torch.where(batch.loss_mask_BL, self.weight.detach(), 0.0)

    def forward_backward(self, batch, loss_function):
        self.events.append(("critic", batch.num_tokens))
        self.seen.append(batch)
        loss, metrics = loss_function(torch.where(batch.rollouts.loss_mask_BL, self.weight, 0.0), batch)
        loss.backward()
        return {name: float(value) for name, value in metrics.items()}

    def optim_step(self):
        with torch.no_grad():
            self.weight -= 0.5 * self.weight.grad
        self.weight.grad = None
        return {"lr": 0.5}


class ReferredTrainer(FakeTrainer):
    """The reference is half a nat surer of every token."""

    def score_reference(self, batch):
        return torch.where(batch.loss_mask_BL, self._logprobs(batch).detach() - 0.5, 0.0)


@pytest.fixture
def cast(tmp_path):
    events = []
    config = load(
        {
            "model": {"path": "x"}, "task": {"name": "x"}, "rollout": {"prompts_per_step": 8, "group_size": 1},
            "algo": {
                "loss": "ppo", "advantage": "gae", "critic": {"warmup_steps": 1}, "epochs": 2, "minibatches": 2,
                "kl_penalty": {"coef": 0.1, "target": 1.0, "horizon": 80},
            },
        }
    )  # fmt: skip
    critic = FakeCritic(events, [], torch.zeros(1, requires_grad=True))
    together = replace(
        parties(tmp_path, engine=FakeEngine(events), trainer=ReferredTrainer(events)),
        critic=critic, kl_penalty=KlController(config.algo.kl_penalty),
    )  # fmt: skip
    return config, together, events


def test_the_critic_learns_alone_at_first_and_then_beside_the_policy(cast):
    config, together, events = cast
    first = train_step(0, together, config)
    assert [n for n, _ in events].count("critic") == 4 and "optim_step" not in [n for n, _ in events]
    assert first.metrics["train/lr"] == 0.0 and together.trainer.version == 0
    # weights that did not move are not published again
    assert {"load", "acknowledge"}.isdisjoint(n for n, _ in events) and "publish/version" not in first.metrics
    assert together.kl_penalty.coef == 0.1  # a policy that stands still says nothing about it
    events.clear()
    second = train_step(1, together, config)
    assert together.trainer.version == 4 and second.metrics["publish/version"] == 4  # epochs x minibatches
    assert ("acknowledge", 4) in events
    names = [n for n, _ in events]
    assert names[1:5] == ["score", "values", "critic", "forward_backward"] and names.count("critic") == 4
    # 3 tokens, each half a nat from the reference: the error of (1.5 - 1) / 1 is clipped to a fifth, over 8 of 80 sequences
    assert second.metrics["ref_kl/sequence"] == pytest.approx(1.5) and second.metrics["ref_kl/coef"] == 0.1
    assert together.kl_penalty.coef == pytest.approx(0.1 * (1 + 0.2 * 8 / 80))
    assert second.metrics["ref_kl/penalty"] == pytest.approx(0.15)
    assert second.metrics["critic/return_mean"] == pytest.approx(second.metrics["reward/mean"] - 0.1, abs=1e-6)
    assert second.metrics["critic/value_loss"] < first.metrics["critic/value_loss"]
    assert {"critic/explained_variance", "critic/value_clipped", "critic/lr"} <= second.metrics.keys()
    assert torch.equal(second.returns_BL[4:], together.critic.seen[-1].returns_BL)


def test_neither_learns_from_samples_without_a_reward(cast):
    config, together, _ = cast

    def half(samples):
        score = torch.tensor([1.0, torch.nan] * (len(samples) // 2))
        failed = dict.fromkeys(range(1, len(samples), 2), "no answer")
        return ComponentScore(score=RewardScore(raw=score, calibrated=score), failed=failed)

    reward = RewardMixture({"judge": half}, weights={"judge": 1.0})
    train_step(0, replace(together, reward=reward), config)
    for batch in together.critic.seen:
        known = batch.correction.keep.any(1)
        assert known.tolist() == [True, False] * 2 and batch.num_tokens == 6 and batch.num_sequences == 2
        assert not batch.advantages_BL[~known].any() and batch.returns_BL[known].any()
