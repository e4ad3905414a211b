"""Conversations of several turns: ids only grow, masks and rewards by turn, and every way to end has a name."""

from __future__ import annotations

import asyncio
import threading
from array import array
from dataclasses import replace

import pytest
import torch

from rlalign.objective import corrections
from rlalign.run.conversation import OUTCOMES, converse
from rlalign.run.step import turns_earned
from rlalign.tasks.environments import Observation
from rlalign.tiny_policy.tokenizer import byte_tokenizer
from rlalign.types import LogprobSpec, Rollout, collate

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    found = byte_tokenizer(256)
    found.chat_template = TEMPLATE
    return found


class Engine:
    """Says what a script has for each conversation, letter by letter; versions grow with the turns."""

    def __init__(self, tokenizer, script: dict[int, list[str]], *, cut: bool = False) -> None:
        self.tokenizer, self.script, self.cut, self.turn, self.asked = tokenizer, script, cut, 0, []

    def generate(self, prompts, *, prompt_ids, samples, seed):
        self.turn += 1
        self.asked.append((list(prompt_ids), [list(p) for p in prompts]))
        return [self._say(list(p), i, group) for group, (p, i) in enumerate(zip(prompts, prompt_ids, strict=True))]

    def _say(self, prompt, number, group):
        text = self.script[number].pop(0)
        ids = [self.tokenizer.convert_tokens_to_ids(t) for t in self.tokenizer.tokenize(text)]
        sampled = ids if self.cut else [*ids, self.tokenizer.eos_token_id]
        start, end = len(prompt), len(prompt) + len(sampled)
        return Rollout(
            token_ids=prompt + sampled, loss_mask=[False] * start + [True] * len(sampled),
            rollout_logprobs=[0.0] * start + [-float(self.turn)] * len(sampled), prompt_id=number, group_id=group,
            finish_reason="length" if self.cut else "stop", version_spans=[(start, end, self.turn)], text=text,
            kept_ids=array("i", sampled), kept_counts=array("q", [1] * len(sampled)),
        )  # fmt: skip


class Counts:
    """Rewards each answer with its length and asks on, until it has heard `turns` of them."""

    def __init__(self, turns: int = 2) -> None:
        self.left = turns

    async def step(self, messages):
        self.left -= 1
        reward = float(len(str(messages[-1]["content"])))
        if not self.left:
            return Observation(reward=reward, done=True)
        return Observation(messages=[{"role": "user", "content": "and?"}], reward=reward)


class Breaks:
    async def step(self, messages):
        raise ConnectionError("the tool hung up")


class Cancels:
    async def step(self, messages):
        raise asyncio.CancelledError


class Remembers:
    """Holds something that lives in one event loop, as a connection does."""

    def __init__(self):
        self.open = None

    async def step(self, messages):
        if self.open is None:
            self.open = asyncio.get_running_loop().create_future()
            return Observation(messages=[{"role": "user", "content": "and?"}])
        self.open.get_loop().call_soon(self.open.set_result, 1.0)
        return Observation(reward=await self.open, done=True)


class Sleeps:
    async def step(self, messages):
        await asyncio.sleep(60)


def play(tokenizer, script, environments, **options):
    engine = Engine(tokenizer, script, cut=options.pop("cut", False))
    starts = [[{"role": "user", "content": f"start {i}"}] for i in range(len(environments))]
    named = {"seed": 0, "max_turns": 4, "room": 200, "timeout_s": 0.2} | options
    return engine, converse(engine, tokenizer, starts, environments, **named)


def test_every_prompt_begins_with_the_ids_of_the_last_one_and_its_answer(tokenizer):
    engine, (short, long) = play(tokenizer, {0: ["x"], 1: ["one", "three", "ninety"]}, [Counts(1), Counts(3)])
    assert [numbers for numbers, _ in engine.asked] == [[0, 1], [1], [1]]
    before = None
    for numbers, prompts in engine.asked:
        prompt = prompts[numbers.index(1)]
        if before is not None:
            assert prompt[: len(before)] == before
        before = long.turns[len(long.turns) - 3 + engine.asked.index((numbers, prompts))].token_ids
    assert (short.outcome, long.outcome) == ("done", "done")
    assert (short.rewards, long.rewards) == ([1.0], [3.0, 5.0, 6.0])
    assert (short.reward, long.reward) == (1.0, 14.0)
    naive = tokenizer.apply_chat_template(long.messages[:-1], add_generation_prompt=True, return_dict=False)
    assert long.turns[-1].token_ids[: len(naive)] == naive  # this template keeps the prefix law


def ends(mask):
    return [t for t, now in enumerate(mask) if now and not (mask[t + 1] if t + 1 < len(mask) else False)]


def test_a_conversation_is_one_rollout_with_a_segment_for_each_turn(tokenizer):
    _, (found,) = play(tokenizer, {0: ["one", "three"]}, [Counts(2)])
    whole = found.rollout()
    batch = collate([whole], pad_token_id=0, spec=LogprobSpec())
    sampled = batch.loss_mask_BL[0]
    runs = (sampled[1:] & ~sampled[:-1]).sum()
    assert int(runs) == 2 and int(sampled.sum()) == len("one") + len("three") + 2
    assert batch.policy_version_BL[0][sampled].tolist() == [1] * 4 + [2] * 6
    assert batch.rollout_logprobs_BL[0][sampled].tolist() == [-1.0] * 4 + [-2.0] * 6
    assert batch.kept.ids_E.tolist() == batch.token_ids_BL[0][sampled].tolist()
    moved = batch.rollout_logprobs_BL + 0.5 * (batch.policy_version_BL == 2)
    weights = corrections.correct(
        moved, batch.rollout_logprobs_BL, batch.loss_mask_BL, level="segment", mode="truncate", high=10.0
    ).weights[0]
    assert weights[sampled].tolist() == pytest.approx([1.0] * 4 + [1.6487213] * 6)
    assert whole.turn_rewards == [(p, r) for p, r in zip(ends(sampled.tolist()), [3.0, 5.0], strict=True)]
    earned_BL = turns_earned([whole], torch.tensor([8.0]), batch)
    assert earned_BL[0].nonzero().flatten().tolist() == ends(sampled.tolist()) and float(earned_BL.sum()) == 8.0
    assert (
        turns_earned([whole], torch.tensor([4.0]), batch) is None
    )  # a mixture of other things than the environment's word
    assert turns_earned([replace(whole, turn_rewards=[])], torch.tensor([8.0]), batch) is None
    lost = replace(found.turns[0], kept_ids=array("i"), kept_counts=array("q"))
    found.turns[0] = lost  # sets of some turns alone are none
    assert not found.rollout().kept_counts


@pytest.mark.parametrize(
    "ages, known",
    [
        ([([5], False), ([5], False)], [5, 5]),  # one version throughout
        ([([4], False), ([5], False)], [-1, -1]),  # published between the turns: the first answer saw keys of version 4
        ([([], True), ([], True)], [1, 2]),  # each token saw keys of its own version
        ([([], True), ([5], False)], [-1, -1]),
    ],
)
def test_the_age_of_keys_is_told_where_all_turns_saw_one(tokenizer, ages, known):
    _, (found,) = play(tokenizer, {0: ["ab", "cd"]}, [Counts(2)])
    found.turns = [
        replace(turn, kv_spans=[(0, len(turn.token_ids), v) for v in versions], kv_recomputed=again)
        for turn, (versions, again) in zip(found.turns, ages, strict=True)
    ]
    batch = collate([found.rollout()], pad_token_id=0, spec=LogprobSpec())
    first_of_turn = [int(batch.kv_version_BL[0][batch.policy_version_BL[0] == turn][0]) for turn in (1, 2)]
    assert first_of_turn == known


@pytest.mark.parametrize(
    ("outcome", "environment", "options"),
    [
        ("done", Counts(1), {}),
        ("turns", Counts(9), {"max_turns": 1}),
        ("context", Counts(9), {"room": 14}),
        ("cut", Counts(9), {"cut": True}),
        ("error", Breaks(), {}),
        ("timeout", Sleeps(), {}),
        ("cancelled", Cancels(), {}),
    ],
)
def test_every_end_has_a_name_and_no_failure_is_a_reward_of_zero(tokenizer, outcome, environment, options):
    _, (found,) = play(tokenizer, {0: ["ab", "cd"]}, [environment], **options)
    assert found.outcome == outcome and outcome in OUTCOMES
    assert len(found.rewards) == len(found.turns) == 1
    assert found.reward == (2.0 if outcome in ("done", "turns", "context") else None)
    assert not found.why or found.outcome in ("error", "timeout", "cancelled")
    assert found.rollout().why == found.why == {"error": "ConnectionError: the tool hung up"}.get(outcome, found.why)


def test_a_failing_environment_leaves_the_others_alone(tokenizer):
    _, (broken, fine) = play(tokenizer, {0: ["a"], 1: ["b", "cd"]}, [Breaks(), Counts(2)])
    assert (broken.outcome, fine.outcome, fine.reward) == ("error", "done", 3.0)


def test_what_an_environment_opens_in_one_turn_is_open_in_the_next(tokenizer):
    _, (found,) = play(tokenizer, {0: ["a", "b"]}, [Remembers()])
    assert (found.outcome, found.why, found.reward) == ("done", "", 1.0)


def test_a_thread_that_an_environment_waits_for_does_not_hold_the_step_beyond_its_time(tokenizer):
    let_go = threading.Event()

    class Blocks:
        async def step(self, messages):
            return await asyncio.to_thread(let_go.wait)

    try:
        _, (found,) = play(tokenizer, {0: ["a"]}, [Blocks()])  # would never return
        assert found.outcome == "timeout"
    finally:
        let_go.set()


def test_a_step_that_is_no_coroutine_is_told_so_and_every_environment_is_closed(tokenizer):
    closed = []

    class Plain:
        def __init__(self, name):
            self.name = name

        def step(self, messages):
            return Observation(reward=1.0, done=True)

        def close(self):
            closed.append(self.name)

    _, (plain, counted) = play(tokenizer, {0: ["a"], 1: ["bc"]}, [Plain("first"), Counts(1)])
    assert plain.outcome == "error" and "Plain.step must be `async def`" in plain.why
    assert (counted.outcome, counted.reward) == ("done", 2.0)
    with pytest.raises(IndexError):  # the engine's script is at its end
        play(tokenizer, {0: []}, [Plain("second")])
    assert closed == ["first", "second"]


def test_rewards_of_turns_are_placed_whatever_their_size():
    """The sum that a sample's reward is was rounded to float32: of 298.3 by 1e-5."""
    rewards = [29.0, 84.3, 92.9, 92.1]
    rollout = Rollout(
        token_ids=[1] * 9, loss_mask=[False, *[True, False] * 4], rollout_logprobs=[0.0] * 9, prompt_id=0, group_id=0,
        finish_reason="stop", version_spans=[(0, 9, 0)], turn_rewards=[(2 * i + 1, r) for i, r in enumerate(rewards)],
    )  # fmt: skip
    batch = collate([rollout], pad_token_id=0, spec=LogprobSpec())
    placed_BL = turns_earned([rollout], torch.tensor([sum(rewards)]), batch)
    assert placed_BL[0, 1::2].tolist() == pytest.approx(rewards)
    assert turns_earned([rollout], torch.tensor([sum(rewards) + 0.1]), batch) is None


def test_what_cannot_be_played_is_refused(tokenizer):
    class Answers:
        async def step(self, messages):
            return 1.0

    with pytest.raises(TypeError, match="must return an Observation, got float: 1.0"):
        play(tokenizer, {0: ["a"]}, [Answers()])
    with pytest.raises(ValueError, match="one environment for each conversation"):
        converse(Engine(tokenizer, {}), tokenizer, [], [Counts()], seed=0, max_turns=1, room=9)
    with pytest.raises(ValueError, match="a first prompt has"):
        play(tokenizer, {0: ["a"]}, [Counts()], room=3)
    with pytest.raises(ValueError, match="either ends the conversation or has messages"):
        Observation()
    with pytest.raises(ValueError, match="assistant's message"):
        Observation(messages=[{"role": "assistant", "content": "x"}])
