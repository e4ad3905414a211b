"""converse(): rollouts of several turns with an environment between them, tokens in and tokens out.

No sampled id is ever encoded again: the next prompt is the last one, the ids sampled after it, and what the chat template puts
behind an answer (`tasks.prefix_law.extend`). A rollout's loss mask has one unbroken run of True for each turn, so that
`level="segment"` in the corrections is a turn.
"""

from __future__ import annotations

import asyncio
import inspect
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rlalign.tasks.environments import Environment, Message, Observation, environment_of
from rlalign.tasks.prefix_law import extend
from rlalign.types import LogprobSpec, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.config import RunConfig
    from rlalign.run.parties import RolloutEngine
    from rlalign.tasks import Task

__all__ = ["OUTCOMES", "Conversation", "Talking", "converse", "prompts_of", "talking"]

OUTCOMES = {
    "done": "the environment ended it",
    "turns": "as many turns as were allowed, and the environment would go on",
    "context": "the next prompt would leave no room for an answer",
    "cut": "an answer was cut at its token limit; the environment did not see it",
    "error": "the environment raised",
    "timeout": "the environment did not answer in time",
    "cancelled": "the environment was cancelled, or cancelled itself",
}
FAILED = ("error", "timeout", "cancelled")
_TURN_SEED = 7919


@dataclass(slots=True, kw_only=True)
class Conversation:
    """One finished conversation. outcome: a key of OUTCOMES. rewards: one for each turn, None where the environment gave none or
    did not answer: never 0 for a failure. why: the environment's error. asked: messages of the first prompt.
    """

    messages: list[Message]
    ids: list[int]
    asked: int = 0
    turns: list[Rollout] = field(default_factory=list)
    rewards: list[float | None] = field(default_factory=list)
    outcome: str = ""
    why: str = ""

    @property
    def reward(self) -> float | None:
        """The sum of the turns' rewards; None without any, and for one that failed."""
        given = [reward for reward in self.rewards if reward is not None]
        return sum(given) if given and self.outcome not in FAILED else None

    def rollout(self) -> Rollout:
        """All turns as one sequence: ids as they went through the engine, each turn with its own logprobs, versions and sets."""
        last = self.turns[-1]
        mask, logprobs = [False] * len(last.token_ids), [0.0] * len(last.token_ids)
        for turn in self.turns:
            for at, sampled in enumerate(turn.loss_mask):
                if sampled:
                    mask[at], logprobs[at] = True, turn.rollout_logprobs[at]
        captured = all(turn.kept_counts for turn in self.turns)
        experts, shape = self._experts()
        one_age = len({(turn.kv_recomputed, *sorted({v for *_, v in turn.kv_spans})) for turn in self.turns}) == 1
        return replace(
            last,
            kv_spans=last.kv_spans if one_age else [],  # an earlier turn saw keys that a later one has no record of
            kv_recomputed=last.kv_recomputed and one_age,
            verified=self.reward,
            turn_rewards=[
                (len(turn.token_ids) - 1, float(reward))
                for turn, reward in zip(self.turns, self.rewards, strict=True)
                if reward is not None
            ],
            outcome=self.outcome,
            why=self.why,
            text="\n".join(f"{m['role']}: {m['content']}" for m in self.messages[self.asked :]),
            experts=experts,
            experts_shape=shape,
            loss_mask=mask,
            rollout_logprobs=logprobs,
            version_spans=[span for turn in self.turns for span in turn.version_spans],
            kept_ids=array("i", [i for turn in self.turns for i in turn.kept_ids] if captured else []),
            kept_counts=array("q", [n for turn in self.turns for n in turn.kept_counts] if captured else []),
        )

    def _experts(self) -> tuple[array, tuple[int, int]]:
        """Of each position as the turn that first went through it did; a later turn may have computed it again."""
        last = self.turns[-1]
        each = last.experts_shape[0] * last.experts_shape[1]
        if not all(turn.experts for turn in self.turns):
            return array("B"), (0, 0)
        found = array(last.experts.typecode)
        for turn in self.turns:
            found.extend(turn.experts[len(found) // each * each :])
        return found, last.experts_shape


def prompts_of(config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """The ids of a prompt by its text, as the first messages of its environment render. ValueError without a chat template."""
    make = environment_of(config.task.environment)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"task.environment={config.task.environment!r}: the tokenizer has no chat template, so nobody can tell turns apart; "
            "give model.path a folder whose tokenizer has one"
        )
    prompts = {p.text: p for p in (*task.train, *task.held_out)}
    return lambda text: _rendered(tokenizer, make(prompts[text], task).start(), {})


def talking(
    config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase
) -> Callable[[RolloutEngine], RolloutEngine]:
    """What a run with task.environment samples through: conversations over the engine it is given."""
    make = environment_of(config.task.environment)
    prompts = {p.prompt_id: p for p in (*task.train, *task.held_out)}
    return lambda engine: Talking(
        engine=engine,
        tokenizer=tokenizer,
        environment=lambda prompt_id: make(prompts[prompt_id], task),
        max_turns=config.task.max_turns,
        room=config.rollout.max_model_len - config.rollout.max_tokens,
        timeout_s=config.task.turn_timeout_s,
    )


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: Mapping[str, object]
) -> list[int]:
    options = {"add_generation_prompt": True, "return_dict": False, **template}
    return list(tokenizer.apply_chat_template(list(messages), **options))


@dataclass(slots=True, kw_only=True)
class Talking:
    """An engine whose completions are conversations: `generate` plays one for each completion that it is asked for.

    environment: makes one conversation's counterpart from the number of its prompt.
    """

    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    environment: Callable[[int], Environment]
    max_turns: int
    room: int
    timeout_s: float

    @property
    def spec(self) -> LogprobSpec:
        return self.engine.spec

    @property
    def policy_version(self) -> int:
        return self.engine.policy_version

    def generate(
        self, prompts: Sequence[Sequence[int]], *, prompt_ids: Sequence[int], samples: int, seed: int
    ) -> list[Rollout]:
        """One rollout of several segments for each conversation, grouped by prompt.

        Raises ValueError where a prompt is not what its environment starts with.
        """
        counterparts = [self.environment(p) for p in prompt_ids for _ in range(samples)]
        found = converse(
            self.engine, self.tokenizer, [c.start() for c in counterparts], counterparts, seed=seed, max_turns=self.max_turns,
            room=self.room, timeout_s=self.timeout_s,
        )  # fmt: skip
        for at, conversation in enumerate(found):
            asked = prompts[at // samples]
            if conversation.turns[0].token_ids[: len(asked)] != list(asked):
                raise ValueError(
                    f"prompt {prompt_ids[at // samples]}: its ids are not those that its environment's first messages render to"
                )
        return [
            replace(c.rollout(), prompt_id=prompt_ids[at // samples], group_id=at // samples)
            for at, c in enumerate(found)
        ]


def converse(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    starts: Sequence[Sequence[Message]],
    environments: Sequence[Environment],
    *,
    seed: int,
    max_turns: int,
    room: int,
    timeout_s: float = 60.0,
    **template: object,
) -> list[Conversation]:
    """Play every conversation to its end, all of them side by side; in the order of `starts`.

    starts: messages of each conversation's first prompt. room: tokens that a prompt may have (context less the longest answer).
    timeout_s: of one environment's answer. template: further arguments of the chat template. A turn is reproducible from the
    seed, its number and the place among the conversations that still go on. Raises ValueError for lists of different lengths, a
    limit below 1, a first prompt without room, or a template that hides an answer (`extend`); TypeError for a step that returns no
    Observation. What an environment raises is an outcome. An environment's `close`, if any, is called at the end.
    """
    if len(starts) != len(environments) or max_turns < 1 or room < 1:
        raise ValueError(
            f"converse: one environment for each conversation, max_turns and room of at least 1; got {len(environments)} for "
            f"{len(starts)}, max_turns={max_turns}, room={room}"
        )
    found = [Conversation(messages=list(m), asked=len(m), ids=_rendered(tokenizer, m, template)) for m in starts]
    longest = max((len(c.ids) for c in found), default=0)
    if longest > room:
        raise ValueError(f"converse: a first prompt has {longest} tokens, room for {room}")
    try:
        with asyncio.Runner() as runner:  # one loop for all turns: what an environment opens in one is open in the next
            runner.get_loop().set_default_executor(_Threads(thread_name_prefix="environment"))
            for turn in range(max_turns):
                going = [i for i, conversation in enumerate(found) if not conversation.outcome]
                if not going:
                    break
                _sample(engine, [found[i] for i in going], going, seed + _TURN_SEED * turn)
                asked = [i for i in going if not found[i].outcome]
                answers = runner.run(_answers([(environments[i], found[i].messages) for i in asked], timeout_s))
                for i, answer in zip(asked, answers, strict=True):
                    _go_on(found[i], answer, tokenizer, template, room=room, last=turn == max_turns - 1)
    finally:
        for environment in environments:
            getattr(environment, "close", lambda: None)()
    return found


class _Threads(ThreadPoolExecutor):
    """Of `asyncio.to_thread` in environments; not waited for: a call beyond its time limit must not hold the step."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=True)


def _sample(engine: RolloutEngine, going: Sequence[Conversation], numbers: Sequence[int], seed: int) -> None:
    """One turn of all of them in one call of the engine."""
    rollouts = engine.generate([c.ids for c in going], prompt_ids=numbers, samples=1, seed=seed)
    for conversation, number, rollout in zip(going, numbers, rollouts, strict=True):
        conversation.turns.append(replace(rollout, group_id=number))
        conversation.ids = list(rollout.token_ids)
        conversation.messages.append({"role": "assistant", "content": rollout.text})
        if rollout.finish_reason == "length":
            conversation.outcome = "cut"
            conversation.rewards.append(None)


async def _answers(asked: Sequence[tuple[Environment, Sequence[Message]]], timeout_s: float) -> list[object]:
    steps = [_answer(environment, messages, timeout_s) for environment, messages in asked]
    return await asyncio.gather(*steps, return_exceptions=True)


async def _answer(environment: Environment, messages: Sequence[Message], timeout_s: float) -> Observation:
    step = environment.step(messages)
    if not inspect.isawaitable(step):
        raise TypeError(f"{type(environment).__name__}.step must be `async def`; it returned {type(step).__name__}")
    return await asyncio.wait_for(step, timeout_s)


def _go_on(
    conversation: Conversation,
    answer: object,
    tokenizer: PreTrainedTokenizerBase,
    template: Mapping[str, object],
    *,
    room: int,
    last: bool,
) -> None:
    if isinstance(answer, BaseException):
        kinds = {TimeoutError: "timeout", asyncio.CancelledError: "cancelled"}
        conversation.outcome = next((kinds[kind] for kind in kinds if isinstance(answer, kind)), "error")
        conversation.why = f"{type(answer).__name__}: {answer}".removesuffix(": ")
        conversation.rewards.append(None)
        return
    if not isinstance(answer, Observation):
        raise TypeError(f"an environment's step must return an Observation, got {type(answer).__name__}: {answer!r}")
    conversation.rewards.append(answer.reward)
    if answer.done:
        conversation.outcome = "done"
        return
    conversation.messages.extend(answer.messages)
    longer = extend(tokenizer, conversation.ids, conversation.messages, **template)
    if last or len(longer) > room:
        conversation.outcome = "turns" if last else "context"
        return
    conversation.ids = longer
