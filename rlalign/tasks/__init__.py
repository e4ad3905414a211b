"""Prompts and the rewards that can be verified: reasoning-gym, JSONL files and Hugging Face datasets behind one Task.

A task is a fixed train split, a fixed held-out split that shares no prompt text with it, and a verifier: 1.0 or 0.0.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from rlalign.tasks.rows import MATCHERS, cell, hf_rows, jsonl_rows, number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Verifier = Callable[["Prompt", str], bool]

__all__ = ["Prompt", "Task", "load_task"]

PLACEHOLDER = "{prompt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One problem. `answer` is "" where several answers are right and only the verifier can tell.

    source: what the verifier reads (the reasoning-gym entry, or the row of the file).
    """

    prompt_id: int
    text: str
    answer: str
    source: Mapping[str, Any] = field(repr=False, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A train split, a held-out split and a verifier. Raises ValueError on no training prompt or a repeated one."""

    name: str
    seed: int
    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    verify: Verifier

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError(f"task {self.name!r}: no training prompts; set train_size to at least 1")
        seen: dict[str, int] = {}
        for prompt in (*self.held_out, *self.train):
            if prompt.text in seen:
                raise ValueError(
                    f"task {self.name!r}: prompts {seen[prompt.text]} and {prompt.prompt_id} have the same text "
                    f"{_short(prompt.text)}; every prompt must be distinct, and held-out ones absent from training"
                )
            seen[prompt.text] = prompt.prompt_id

    def train_prompts(self, step: int, count: int) -> list[Prompt]:
        """The prompts of training step `step` (from 0) when every step takes `count`.

        A function of (seed, step, count) alone, so a resumed run continues the same sequence. Every epoch visits each
        prompt once, in its own order; a step that crosses two epochs may hold one prompt twice.
        Raises ValueError when count exceeds the split.
        """
        size = len(self.train)
        if step < 0 or not 1 <= count <= size:
            raise ValueError(
                f"task {self.name!r}: step {step} asks for {count} of {size} training prompts; "
                f"need step >= 0 and 1 <= count <= {size}"
            )
        start = step * count
        orders = {at: _order(size, self.seed, at) for at in {start // size, (start + count - 1) // size}}
        return [self.train[orders[at // size][at % size]] for at in range(start, start + count)]

    def eval_prompts(self) -> list[Prompt]:
        """The held-out prompts, always in the same order."""
        return list(self.held_out)

    def reward(self, prompt: Prompt, completion: str | None) -> float:
        """1.0 when the completion, stripped of white space, is a right answer, else 0.0. None: no answer was given."""
        answer = (completion or "").strip()
        return 1.0 if answer and self.verify(prompt, answer) else 0.0


@lru_cache(maxsize=4)  # every step asks again, and a shuffle of a million prompts takes a second
def _order(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def load_task(name: str, params: Mapping[str, Any], *, train_size: int, eval_size: int, seed: int) -> Task:
    """The task called `name`, split into `eval_size` held-out and `train_size` training prompts.

    name: `reasoning_gym:TASK` or plain `TASK`, `game:higher_lower`, `jsonl:PATH`, `hf:NAME_OR_FOLDER`.
    params of all: `template` ("{prompt} ="), `prompt_field`. reasoning-gym: every other key configures the task, and
    prompt_field is "question" or a key of the entry's metadata. jsonl and hf: `answer_field`, `match` (exact, numeric,
    last_number), `answer_after` (keep what follows this mark in the reference); hf also `split` and `subset`.
    The held-out prompts are taken first, so those of one name, params, eval_size and seed stay the same whatever
    train_size is (the few reasoning-gym generators that draw all entries at once excepted).
    Raises ValueError for whatever the user can repair, RuntimeError when a package is missing.
    """
    if train_size < 1 or eval_size < 0:
        raise ValueError(f"task {name!r}: train_size {train_size} must be >= 1 and eval_size {eval_size} >= 0")
    kind, _, rest = name.partition(":") if ":" in name else ("reasoning_gym", "", name)
    options = dict(params)
    template = _text_option(options, "template", PLACEHOLDER, name)
    if PLACEHOLDER not in template:
        raise ValueError(f"task {name!r}: template {template!r} does not contain {PLACEHOLDER}")
    if kind == "reasoning_gym":
        prompts, verify = _from_reasoning_gym(rest, options, template, train_size + eval_size, seed)
    elif kind == "game":
        prompts, verify = _game(rest, options, train_size + eval_size, seed)
    elif kind in ("jsonl", "hf"):
        prompts, verify = _from_rows(kind, rest, options, template, seed)
    else:
        raise ValueError(
            f"task {name!r}: unknown kind {kind!r}; use reasoning_gym:TASK, game:higher_lower, jsonl:PATH or hf:NAME"
        )
    if len(prompts) < train_size + eval_size:
        raise ValueError(
            f"task {name!r}: found {len(prompts)} distinct prompts, need {train_size + eval_size} "
            f"(train_size {train_size} + eval_size {eval_size}); ask for fewer or widen the task"
        )
    held_out, train = prompts[:eval_size], prompts[eval_size : eval_size + train_size]
    return Task(name=name, seed=seed, train=tuple(train), held_out=tuple(held_out), verify=verify)


# reasoning-gym


class _Procedural(Protocol):
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def score_answer(self, answer: str | None, entry: Mapping[str, Any]) -> float: ...


def _from_reasoning_gym(
    task: str, options: dict[str, Any], template: str, wanted: int, seed: int
) -> tuple[list[Prompt], Verifier]:
    """Up to `wanted` prompts with distinct text, in the order in which the generator yields them."""
    prompt_field = _text_option(options, "prompt_field", "question", task)
    dataset = _create(task, options, wanted, seed)
    prompts: list[Prompt] = []
    seen: set[str] = set()
    # Entry i of most generators is seeded by seed + i: the next chunk's seed continues the stream.
    misses, chunk = 0, dataset
    for draw in range(10**9):
        if len(prompts) == wanted or misses > 2 * wanted + 1000:
            break
        if draw and draw % wanted == 0:
            chunk = _create(task, options, wanted, seed + draw)
        entry = chunk[draw % wanted]
        text = template.replace(PLACEHOLDER, _entry_text(task, entry, prompt_field))
        misses += 1
        if text not in seen:
            seen.add(text)
            answer = entry["answer"]
            prompts.append(Prompt(prompt_id=len(prompts), text=text, answer=answer or "", source=entry))
            misses = 0
    return prompts, _scored_by(task, dataset)


def _create(task: str, options: Mapping[str, Any], size: int, seed: int) -> _Procedural:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise RuntimeError("reasoning-gym tasks need the package: pip install reasoning-gym==0.1.25") from error
    if task not in DATASETS:
        close = get_close_matches(task, DATASETS, n=3) or sorted(DATASETS)[:3]
        raise ValueError(f"unknown reasoning-gym task {task!r}; did you mean {', '.join(close)}?")
    known = {f.name for f in fields(DATASETS[task][1])} - {"seed", "size"}
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"reasoning-gym task {task!r} has no parameter {', '.join(unknown)}; "
            f"it takes {', '.join(sorted(known))} (its seed and size come from the run)"
        )
    try:
        return cast("_Procedural", reasoning_gym.create_dataset(task, seed=seed, size=size, **options))
    except (AssertionError, TypeError, ValueError) as error:  # how reasoning-gym rejects a configuration
        raise ValueError(f"reasoning-gym task {task!r} rejects {dict(options)}: {error}") from error


def _entry_text(task: str, entry: Mapping[str, Any], prompt_field: str) -> str:
    metadata = entry["metadata"]
    text = entry["question"] if prompt_field == "question" else metadata.get(prompt_field)
    if isinstance(text, str) and text.strip():
        return text
    usable = ["question", *(key for key, value in metadata.items() if isinstance(value, str))]
    raise ValueError(f"reasoning-gym task {task!r} has no text in {prompt_field!r}; prompt_field is one of {usable}")


def _scored_by(task: str, dataset: _Procedural) -> Verifier:
    """Right when reasoning-gym's scorer gives full marks: it pays part of them for text that contains the answer.

    Some scorers raise on text that they cannot parse. That counts as wrong only once the same scorer has accepted the
    same entry's own reference answer: then it is the text that is at fault, not the scorer. Else RuntimeError.
    """

    def verify(prompt: Prompt, answer: str) -> bool:
        try:
            return dataset.score_answer(answer, prompt.source) >= 1.0
        except Exception as error:
            try:
                dataset.score_answer(prompt.source["answer"], prompt.source)
            except Exception:
                raise RuntimeError(
                    f"the scorer of reasoning-gym task {task!r} fails on its own reference answer "
                    f"{prompt.answer!r} to {_short(prompt.text)}; no reward can be given"
                ) from error
            return False

    return verify


# games


def _game(name: str, options: dict[str, object], wanted: int, seed: int) -> tuple[list[Prompt], Verifier]:
    """Secret numbers for `environments.HigherLower`; params: high, the largest of them."""
    high = options.pop("high", 100)
    if name != "higher_lower" or options or not isinstance(high, int) or high < 2:
        raise ValueError(
            f"task game:{name} with {options | {'high': high}}: there is game:higher_lower, with high of at least 2"
        )
    draw = random.Random(f"{seed}/higher_lower")
    prompts = []
    for i in range(wanted):
        secret = draw.randint(1, high)
        text = f"Game {i + 1}: guess my number from 1 to {high}."
        prompts.append(Prompt(prompt_id=i, text=text, answer=str(secret), source={"secret": secret}))
    return prompts, lambda prompt, answer: MATCHERS["last_number"](prompt.answer, answer)


# files and datasets


def _from_rows(
    kind: str, place: str, options: dict[str, Any], template: str, seed: int
) -> tuple[list[Prompt], Verifier]:
    """Every row as a prompt, in an order drawn from the seed."""
    name = f"{kind}:{place}"
    prompt_field = _text_option(options, "prompt_field", "prompt", name)
    answer_field = _text_option(options, "answer_field", "answer", name)
    after = _text_option(options, "answer_after", "", name)
    match = _text_option(options, "match", "exact", name)
    if match not in MATCHERS:
        raise ValueError(f"task {name!r}: match {match!r} is not one of {', '.join(MATCHERS)}")
    split, subset = "train", ""
    if kind == "hf":
        split = _text_option(options, "split", split, name)
        subset = _text_option(options, "subset", subset, name)
    if options:
        raise ValueError(f"task {name!r} has no parameter {', '.join(sorted(options))}")
    rows = jsonl_rows(Path(place)) if kind == "jsonl" else hf_rows(place, split, subset)
    prompts: list[Prompt] = []
    first: dict[str, str] = {}
    for where, row in rows:
        text = template.replace(PLACEHOLDER, cell(row, prompt_field, where))
        if text in first:
            raise ValueError(f"{where}: same prompt as {first[text]}: {_short(text)}; remove one of them")
        first[text] = where
        answer = _reference(row, answer_field, after, where)
        if match != "exact" and number(answer) is None:
            raise ValueError(f"{where}: answer {answer!r} is not a number, which match={match} needs")
        prompts.append(Prompt(prompt_id=len(prompts), text=text, answer=answer, source=row))
    if not prompts:
        raise ValueError(f"task {name!r} is empty: no rows in {place}")
    random.Random(f"{seed}/rows").shuffle(prompts)
    same = MATCHERS[match]
    return prompts, lambda prompt, answer: same(prompt.answer, answer)


def _reference(row: Mapping[str, Any], answer_field: str, after: str, where: str) -> str:
    text = cell(row, answer_field, where)
    if after and after not in text:
        raise ValueError(f"{where}: answer_after {after!r} does not occur in {_short(text)}")
    reference = (text.rpartition(after)[2] if after else text).strip()
    if not reference:
        raise ValueError(f"{where}: nothing follows answer_after {after!r} in {_short(text)}")
    return reference


def _text_option(options: dict[str, Any], name: str, default: str, task: str) -> str:
    value = options.pop(name, default)
    if not isinstance(value, str):
        raise ValueError(f"task {task!r}: {name} must be text, got {value!r}")
    return value


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
