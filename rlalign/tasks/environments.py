"""Environments: what answers a policy between its turns. Two are shipped, a calculator and a game; any other fits the protocol.

An environment sees messages and never tokens. It lives for one conversation.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rlalign.tasks import Prompt, Task

__all__ = ["ENVIRONMENTS", "Calculator", "Environment", "HigherLower", "Observation", "calculate", "environment_of"]

Message = Mapping[str, object]


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
    """One conversation's counterpart: tools, a game, a simulated user. A `close()` of its own, where it has one, ends it."""

    def start(self) -> list[Message]:
        """The messages of the first prompt. Called of throw-away instances too: cheap, repeatable, and it opens nothing."""
        ...

    async def step(self, messages: Sequence[Message]) -> Observation:
        """What follows the last message, the assistant's answer. May raise; it may be cancelled at its time limit."""
        ...


_CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)


@dataclass(slots=True)
class Calculator:
    """A tool beside any task: <calc>EXPRESSION</calc> is answered with its value; an answer without a call is final, and verified.

    A call that cannot be computed is answered with what is wrong: the policy may repair it, and no reward is given for it.
    """

    prompt: Prompt
    task: Task

    def start(self) -> list[Message]:
        """The task's prompt behind the tool's one line of instruction."""
        said = "To compute, write <calc>EXPRESSION</calc> and wait for its value. Otherwise write the answer alone."
        return [{"role": "user", "content": f"{said}\n{self.prompt.text}"}]

    async def step(self, messages: Sequence[Message]) -> Observation:
        """The value of the last call, or the verifier's word."""
        answer = str(messages[-1]["content"])
        calls = _CALL.findall(answer)
        if not calls:
            return Observation(reward=self.task.reward(self.prompt, answer), done=True)
        try:
            said = calculate(calls[-1])
        except ValueError as error:
            said = f"error: {error}"
        return Observation(messages=[{"role": "user", "content": f"<value>{said}</value>"}])


_WHOLE = re.compile(r"[-+]?\d+")


@dataclass(slots=True)
class HigherLower:
    """Guess a whole number in so many turns; rewarded 1 for the number and 0 when the guesses are used up, the rule of the game.

    The prompt's answer is the number (task `game:higher_lower`). What is no number is a guess too.
    """

    prompt: Prompt
    task: Task
    guesses: int = 6
    used: int = 0

    def start(self) -> list[Message]:
        """The game's rule."""
        return [{"role": "user", "content": self.prompt.text}]

    async def step(self, messages: Sequence[Message]) -> Observation:
        """Higher, lower, or the end."""
        self.used += 1
        found, secret = _WHOLE.findall(str(messages[-1]["content"])), int(self.prompt.answer)
        guess = int(found[-1]) if found else None
        if guess == secret or self.used == self.guesses:
            return Observation(reward=float(guess == secret), done=True)
        said = "write a number" if guess is None else "higher" if guess < secret else "lower"
        return Observation(messages=[{"role": "user", "content": said}])


_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
_LONGEST = 200  # characters of an expression


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / // % and brackets. Raises ValueError saying what cannot be computed.

    No powers and no names: nothing that a policy writes can take long or reach anything.
    """
    text = expression.strip()
    if not 0 < len(text) <= _LONGEST:
        raise ValueError(f"an expression has 1 to {_LONGEST} characters, got {len(text)}")
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, RecursionError):
        raise ValueError("this is no expression of numbers, + - * / // % and brackets") from None
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(str(error)) from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("the value is too large to be computed")
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return str(int(value)) if whole else str(value)


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("only numbers, + - * / // % and brackets can be computed")


ENVIRONMENTS: dict[str, Callable[[Prompt, Task], Environment]] = {
    "calculator": Calculator,
    "higher_lower": HigherLower,
}


def environment_of(name: str) -> Callable[[Prompt, Task], Environment]:
    """A shipped environment by its name, or "module:attribute": a callable of (prompt, task). Raises ValueError for neither."""
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"task.environment={name!r}: choose one of {', '.join(ENVIRONMENTS)}, or module:attribute")
    from importlib import import_module

    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"task.environment={name!r} cannot be loaded: {error}") from error
