"""Prompts that a run cannot take, found before its first step and not in the middle of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rlalign.config import RunConfig
from rlalign.tasks import Prompt, Task

SHOWN = 3  # prompts that an error names


@dataclass(frozen=True, slots=True)
class Unfit:
    """A prompt that cannot be used, and why."""

    prompt: Prompt
    why: str


def unfit(prompts: Sequence[Prompt], config: RunConfig, encode: Callable[[str], list[int]], rows: int) -> list[Unfit]:
    """Those longer than the engine has room for, and those with an id that the model has no row for (rows: of its embedding)."""
    room = config.rollout.max_model_len - config.rollout.max_tokens
    found = []
    for prompt in prompts:
        ids = encode(prompt.text)
        if not ids:
            found.append(Unfit(prompt, "no token"))
        elif len(ids) > room:
            found.append(Unfit(prompt, f"{len(ids)} tokens"))
        elif max(ids) >= rows:
            found.append(Unfit(prompt, f"token id {max(ids)}, the model has {rows} rows"))
    return found


def fitted(task: Task, config: RunConfig, encode: Callable[[str], list[int]], rows: int) -> tuple[Task, int]:
    """The task with prompts that fit, and how many were dropped (task.unusable_prompts=drop).

    Raises ValueError naming them where the run is to stop at them, and where too few are left.
    """
    bad = unfit([*task.train, *task.held_out], config, encode, rows)
    if not bad:
        return task, 0
    what = describe(bad, len(task.train) + len(task.held_out), config)
    if config.task.unusable_prompts == "stop":
        raise ValueError(f"task {task.name!r}: {what}; raise rollout.max_model_len, or task.unusable_prompts=drop")
    gone = {each.prompt.text for each in bad}
    train = tuple(p for p in task.train if p.text not in gone)
    held_out = tuple(p for p in task.held_out if p.text not in gone)
    if len(train) < config.rollout.prompts_per_step or not held_out:
        raise ValueError(
            f"task {task.name!r}: {what}; {len(train)} training and {len(held_out)} held-out prompts are left, and a run needs "
            f"rollout.prompts_per_step={config.rollout.prompts_per_step} and 1"
        )
    return replace(task, train=train, held_out=held_out), len(bad)


def describe(bad: Sequence[Unfit], of: int, config: RunConfig) -> str:
    """How many of how many, the first of them, and the room there is."""
    room = config.rollout.max_model_len - config.rollout.max_tokens
    named = "; ".join(f"{each.why}: {each.prompt.text[:40]!r}" for each in bad[:SHOWN])
    more = ", ..." if len(bad) > SHOWN else ""
    return (
        f"{len(bad)} of {of} prompts cannot be used (room for {room} tokens: rollout.max_model_len - rollout.max_tokens), "
        f"{named}{more}"
    )
