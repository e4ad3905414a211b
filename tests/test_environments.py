"""What the shipped environments answer, and what a calculator never does."""

from __future__ import annotations

import asyncio
import math
from fractions import Fraction

import pytest

from rlalign.reward.mixture import RewardMixture, Sample
from rlalign.run.step import sample_of
from rlalign.tasks import load_task
from rlalign.tasks.environments import Calculator, HigherLower, calculate, environment_of
from rlalign.types import Rollout


def ask(environment, *answers):
    """Observations of these answers, one after the other."""
    messages, found = environment.start(), []
    for answer in answers:
        messages.append({"role": "assistant", "content": answer})
        found.append(asyncio.run(environment.step(messages)))
        messages.extend(found[-1].messages)
    return found


@pytest.fixture(scope="module")
def sums():
    return load_task("basic_arithmetic", {"min_terms": 2, "max_terms": 2}, train_size=4, eval_size=1, seed=0)


def test_a_call_is_answered_and_an_answer_is_verified(sums):
    prompt = sums.train[0]
    called, broken, right = ask(
        Calculator(prompt, sums), "<calc>(2 + 3) * 4</calc>", "<calc>1 / 0</calc>", prompt.answer
    )
    assert (called.messages[0]["content"], called.reward, called.done) == ("<value>20</value>", None, False)
    assert "error: division by zero" in broken.messages[0]["content"] and broken.reward is None
    assert (right.reward, right.done) == (1.0, True)
    assert ask(Calculator(prompt, sums), "I do not know")[0].reward == 0.0
    assert prompt.text in Calculator(prompt, sums).start()[0]["content"]


@pytest.mark.parametrize("expression", ["7 - 10", "2 * (3 + 4) - 5", "-3 % 5", "22 // 7", "1.5 * 4"])
def test_the_calculator_is_arithmetic(expression):
    exact = eval(expression.replace("1.5", "Fraction(3, 2)"), {"Fraction": Fraction})
    assert Fraction(calculate(expression)) == exact


@pytest.mark.parametrize(
    "expression",
    ["", "9**9**9", "__import__('os')", "x + 1", "1" * 500, "(" * 150, "True + 1", "1 if 2 else 3", "1e308 * 10"],
)
def test_the_calculator_computes_nothing_else(expression):
    with pytest.raises(ValueError, match="expression|computed"):
        calculate(expression)


def test_a_game_is_won_lost_or_goes_on():
    task = load_task("game:higher_lower", {"high": 50}, train_size=8, eval_size=2, seed=3)
    prompt = task.train[0]
    secret = int(prompt.answer)
    assert 1 <= secret <= 50 and len({p.text for p in task.train}) == 8
    low, none, high, won = ask(HigherLower(prompt, task), str(secret - 1), "well", f"maybe {secret + 1}", f"{secret}!")
    assert [o.messages[0]["content"] for o in (low, none, high)] == ["higher", "write a number", "lower"]
    assert (won.reward, won.done) == (1.0, True)
    *_, lost = ask(HigherLower(prompt, task, guesses=2), "0", "0")
    assert (lost.reward, lost.done) == (0.0, True)
    with pytest.raises(ValueError, match="there is game:higher_lower"):
        load_task("game:chess", {}, train_size=1, eval_size=1, seed=0)


def test_an_environment_is_found_by_name_or_place():
    assert environment_of("calculator") is Calculator
    assert environment_of("rlalign.tasks.environments:HigherLower") is HigherLower
    for name in ("calculators", "rlalign.nowhere:A", "rlalign.tasks.environments:Nothing"):
        with pytest.raises(ValueError, match=r"task\.environment"):
            environment_of(name)


def test_a_conversation_without_a_reward_leaves_the_loss_and_says_why(sums):
    def ended(outcome, verified, why=""):
        rollout = Rollout(
            token_ids=[1, 2], loss_mask=[False, True], rollout_logprobs=[0.0, -1.0], prompt_id=0, group_id=0,
            finish_reason="stop", version_spans=[(1, 2, 0)], outcome=outcome, verified=verified, why=why,
        )  # fmt: skip
        return sample_of(rollout, sums.train[0], sums)

    assert isinstance(ended("done", 0.5), Sample)
    rewards = RewardMixture()([ended("done", 1.0), ended("error", None, "OSError: gone"), ended("done", 0.0)])
    assert math.isnan(rewards.values_B[1]) and rewards.values_B[[0, 2]].tolist() == [1.0, 0.0]
    assert rewards.failed == {1: "verifier: the conversation ended without a reward (error: OSError: gone)"}
