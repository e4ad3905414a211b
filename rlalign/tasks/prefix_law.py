"""check_prefix_law(): does the prompt of the next turn begin with the ids of the last prompt and of what was sampled after it?

A trainer scores the ids that the policy saw. Rendering the whole conversation again for each turn keeps that only if the chat
template adds text at the end and nowhere else, and if the text encodes to the ids that were sampled. `extend` needs neither: it
renders what the template puts behind an answer, and appends its ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CAUSES", "Breach", "check_prefix_law", "extend"]

Message = Mapping[str, Any]
CAUSES = {
    "bos twice": "the template writes the BOS token and the tokenizer adds another: encode with add_special_tokens=False",
    "stripped thinking": "the template drops the thinking of earlier answers: keep it, or train each turn as a sequence of its own",
    "trimmed content": "the template trims white space of earlier answers",
    "answer framed otherwise": "the template opens an answer in the history otherwise than its generation prompt did",
    "history rewritten": "the template changes text before an earlier answer when the conversation goes on",
    "re-tokenisation": "the text is the same, but encodes to other ids than were sampled: carry ids from turn to turn (`extend`)",
}
_SENTINEL = "\u2983rlalign\u2984"
_THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Breach:
    """The first id of the prompt of `next_turn` that is not what turn `turn` left behind.

    turn, next_turn: indices of messages; an assistant's, and the assistant's after it (or the number of messages). position: in
    the ids; expected, found: ids there, None past an end. cause: a key of CAUSES. kept: ids that agree, share: of those expected.
    """

    turn: int
    next_turn: int
    position: int
    expected: int | None
    found: int | None
    cause: str
    share: float

    def message(self) -> str:
        """One line: where, which ids, why, what to do."""
        return (
            f"message {self.turn}: the prompt after it has id {self.found} at position {self.position}, expected {self.expected} "
            f"({self.share:.0%} of the ids agree before it): {self.cause}. {CAUSES[self.cause]}"
        )


def check_prefix_law(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    sampled: Mapping[int, Sequence[int]] | None = None,
    **template: object,
) -> list[Breach]:
    """The breaches of a conversation, one for each assistant message that has one; empty where the law holds.

    messages: as chat templates take them, the assistant's content a string. sampled: index of an assistant message -> the ids the
    policy sampled there, end-of-turn token or not; without it an answer is what its content encodes to behind its prompt.
    template: further arguments of `apply_chat_template`, such as tools or enable_thinking.
    Raises ValueError without a chat template, without an assistant's message, and for sampled ids of another role's message.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("check_prefix_law: the tokenizer has no chat template; give it the one that the rollouts use")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError(
            f"check_prefix_law: none of the {len(messages)} messages is an assistant's, so nothing was sampled"
        )
    wrong = sorted(set(sampled or {}) - set(turns))
    if wrong:
        raise ValueError(
            f"check_prefix_law: sampled ids for messages {wrong}, which are no assistant's (those are {turns})"
        )
    found = [
        _of_turn(tokenizer, messages, i, end, (sampled or {}).get(i), template)
        for i, end in zip(turns, [*turns[1:], len(messages)], strict=True)
    ]
    return [breach for breach in found if breach is not None]


def extend(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], messages: Sequence[Message], **template: object
) -> list[int]:
    """The prompt of the next turn: `ids` untouched, and behind them what the template adds.

    ids: the last prompt with the ids sampled after it. messages: the whole conversation; its last assistant's message is the answer
    those ids hold, what follows it is new (tool results, the user's next words). An end-of-turn token that was sampled is not added
    again. Raises ValueError without an assistant's message, and for a template that does not show the answer as it stands.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError(
            "extend: the conversation has no assistant's message, so nothing was sampled that could be extended"
        )
    marked = [dict(m) | {"content": _SENTINEL} if i == turns[-1] else m for i, m in enumerate(messages)]
    _, answer, added = _text(tokenizer, marked, template).rpartition(_SENTINEL)
    if not answer:
        raise ValueError(
            f"extend: the chat template does not show the content of message {turns[-1]}; without it nobody can tell what it adds "
            "behind the answer"
        )
    new = tokenizer.encode(added, add_special_tokens=False)
    return [*ids, *(new[1:] if ids and new and new[0] == ids[-1] and ids[-1] in tokenizer.all_special_ids else new)]


def _text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: Mapping[str, Any]) -> str:
    options: dict[str, Any] = {"add_generation_prompt": True, **template, "tokenize": False}
    return cast("str", tokenizer.apply_chat_template([dict(message) for message in messages], **options))


def _ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: Mapping[str, Any]) -> list[int]:
    options: dict[str, Any] = {**template, "add_generation_prompt": True, "return_dict": False}
    return list(cast("list[int]", tokenizer.apply_chat_template([dict(message) for message in messages], **options)))


def _of_turn(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    turn: int,
    end: int,
    sampled: Sequence[int] | None,
    template: Mapping[str, Any],
) -> Breach | None:
    """messages[:end] is the conversation of the prompt after this turn."""
    content = str(messages[turn]["content"])
    prompt = _ids(tokenizer, messages[:turn], template)
    answer = tokenizer.encode(content, add_special_tokens=False) if sampled is None else list(sampled)
    expected, after = [*prompt, *answer], _ids(tokenizer, messages[:end], template)
    bos = tokenizer.bos_token_id
    if bos is not None and prompt[:2] == [bos, bos]:
        return _breach(turn, end, 1, expected, [*prompt[:1], *prompt[2:]], "bos twice", swap=True)
    position = next((t for t, (a, b) in enumerate(zip(expected, after, strict=False)) if a != b), len(after))
    if position >= len(expected):
        return None
    before, now = _text(tokenizer, messages[:turn], template), _text(tokenizer, messages[:end], template)
    asked = _text(tokenizer, messages[:turn], {**template, "add_generation_prompt": False})
    cause = _cause(before, asked, content, now, said=None if sampled is None else str(tokenizer.decode(list(sampled))))
    return _breach(turn, end, position, expected, after, cause)


def _cause(before: str, asked: str, content: str, now: str, *, said: str | None) -> str:
    """before: the prompt's text; asked: it without the generation prompt; now: the next prompt's; said: the sampled text."""
    if now.startswith(before + content):
        return "re-tokenisation"
    if now.startswith(before) and now[len(before) :].lstrip().startswith(content.strip()):
        return "trimmed content"
    without = _THINKING.sub("", content)
    opened = re.sub(r"<think>\s*(?:</think>\s*)?$", "", before)  # a generation prompt may open the thinking
    if (
        without != content
        and content.strip() not in now
        and (now.startswith((before + without, opened + without)) or without.strip() in now[len(opened) :])
    ):
        return "stripped thinking"
    if said is not None and now.startswith(before + said):
        return "re-tokenisation"
    return "answer framed otherwise" if now.startswith(asked) else "history rewritten"


def _breach(
    turn: int, end: int, position: int, expected: Sequence[int], after: Sequence[int], cause: str, *, swap: bool = False
) -> Breach:
    first, second = (after, expected) if swap else (expected, after)
    return Breach(
        turn=turn,
        next_turn=end,
        position=position,
        expected=first[position] if position < len(first) else None,
        found=second[position] if position < len(second) else None,
        cause=cause,
        share=position / max(1, len(expected)),
    )
