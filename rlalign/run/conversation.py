"""converse(): rollouts of several turns with an environment between them, tokens in and tokens out.

No sampled id is ever encoded again: the next prompt is the last one, the ids sampled after it, and what the chat template puts
behind an answer (`tasks.prefix_law.extend`). A rollout's loss mask has one unbroken run of True for each turn, so that
`level="segment"` in the corrections is a turn.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from rlalign.tasks.prefix_law import extend
from rlalign.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.run.parties import RolloutEngine

__all__ = ["OUTCOMES", "Conversation", "Environment", "Observation", "converse"]

Message = Mapping[str, object]
OUTCOMES = {
    "done": "the environment ended it",
    "turns": "as many turns as were allowed, and the environment would go on",
    "context": "the next prompt would leave no room for an answer",
    "cut": "an answer was cut at its token limit; the environment did not see it",
    "error": "the environment raised",
    "timeout": "the environment did not answer in time",
}
_TURN_SEED = 7919


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What an environment says of an answer. messages: to append, empty where done. reward: of this turn, None for none."""

    messages: Sequence[Message] = ()
    reward: float | None = None
    done: bool = False

    def __post_init__(self) -> None:
        if self.done == bool(self.messages):
            raise ValueError(
                f"an observation either ends the conversation or has messages for the next turn; got done={self.done} with "
                f"{len(self.messages)} messages"
            )
        if any(message["role"] == "assistant" for message in self.messages):
            raise ValueError("an observation holds an assistant's message; only sampled answers are the assistant's")


class Environment(Protocol):
    """One conversation's counterpart: tools, a game, a simulated user."""

    async def step(self, messages: Sequence[Message]) -> Observation:
        """What follows the last message, the assistant's answer. May raise; it may be cancelled at its time limit."""
        ...


@dataclass(slots=True, kw_only=True)
class Conversation:
    """One finished conversation. outcome: a key of OUTCOMES. rewards: one for each turn, None where the environment gave none or
    did not answer: never 0 for a failure. why: the environment's error.
    """

    messages: list[Message]
    ids: list[int]
    turns: list[Rollout] = field(default_factory=list)
    rewards: list[float | None] = field(default_factory=list)
    outcome: str = ""
    why: str = ""

    @property
    def reward(self) -> float | None:
        """The sum of the turns' rewards; None without any, and for one that failed."""
        given = [reward for reward in self.rewards if reward is not None]
        return sum(given) if given and self.outcome not in ("error", "timeout") else None

    def rollout(self) -> Rollout:
        """All turns as one sequence: ids as they went through the engine, each turn with its own logprobs, versions and sets."""
        last = self.turns[-1]
        mask, logprobs = [False] * len(last.token_ids), [0.0] * len(last.token_ids)
        for turn in self.turns:
            for at, sampled in enumerate(turn.loss_mask):
                if sampled:
                    mask[at], logprobs[at] = True, turn.rollout_logprobs[at]
        captured = all(turn.kept_counts for turn in self.turns)
        return replace(
            last,
            loss_mask=mask,
            rollout_logprobs=logprobs,
            version_spans=[span for turn in self.turns for span in turn.version_spans],
            kept_ids=array("i", [i for turn in self.turns for i in turn.kept_ids] if captured else []),
            kept_counts=array("q", [n for turn in self.turns for n in turn.kept_counts] if captured else []),
        )


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
    limit below 1, or a first prompt without room; what goes wrong later is an outcome.
    """
    if len(starts) != len(environments) or max_turns < 1 or room < 1:
        raise ValueError(
            f"converse: one environment for each conversation, max_turns and room of at least 1; got {len(environments)} for "
            f"{len(starts)}, max_turns={max_turns}, room={room}"
        )
    options = {"add_generation_prompt": True, "return_dict": False, **template}
    found = [
        Conversation(messages=list(m), ids=list(tokenizer.apply_chat_template(list(m), **options))) for m in starts
    ]
    longest = max((len(c.ids) for c in found), default=0)
    if longest > room:
        raise ValueError(f"converse: a first prompt has {longest} tokens, room for {room}")
    for turn in range(max_turns):
        going = [i for i, conversation in enumerate(found) if not conversation.outcome]
        if not going:
            break
        _sample(engine, [found[i] for i in going], going, seed + _TURN_SEED * turn)
        asked = [i for i in going if not found[i].outcome]
        answers = asyncio.run(_answers([(environments[i], found[i].messages) for i in asked], timeout_s))
        for i, answer in zip(asked, answers, strict=True):
            _go_on(found[i], answer, tokenizer, template, room=room, last=turn == max_turns - 1)
    return found


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
    steps = [asyncio.wait_for(environment.step(messages), timeout_s) for environment, messages in asked]
    return await asyncio.gather(*steps, return_exceptions=True)


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
        conversation.outcome = "timeout" if isinstance(answer, TimeoutError) else "error"
        conversation.why = f"{type(answer).__name__}: {answer}"
        conversation.rewards.append(None)
        return
    assert isinstance(answer, Observation)
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
