"""Tokens: one vocabulary, one chat template and one set of special tokens on both sides, and prompts that fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.config import RunConfig
from rlalign.diagnose.both_sides import model_folder
from rlalign.diagnose.doctor.check import Check, judged, text_config
from rlalign.rollout.engine.completions import UnknownIds
from rlalign.run import assembly
from rlalign.run.assembly import encode, load_task_of, load_tokenizer
from rlalign.tasks.prefix_law import check_prefix_law
from rlalign.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = 8  # of the task, sampled once through the live engine
CONVERSATION = (
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "<think>\nTwo and three.\n</think>\n\nIt is 5."},
    {"role": "user", "content": "And 4 + 4?"},
    {"role": "assistant", "content": "It is 8."},
    {"role": "user", "content": "Thank you."},
)
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def tokenizer(config: RunConfig) -> Iterator[Check]:
    """The trainer's tokenizer by itself: identity, special tokens, chat template, prompt lengths."""
    model = model_folder(config)
    ours = load_tokenizer(model)
    yield Check("tokenizer", "ok", f"{len(ours)} tokens, vocabulary, special tokens and chat template {identity(ours)}")
    yield special_tokens(model, ours)
    yield unknown_ids(model, ours, barred=config.rollout.bar_unknown_ids)
    if config.task.chat_template:
        yield judged(
            "chat template",
            ours.chat_template is not None,
            "the tokenizer has one" if ours.chat_template else "task.chat_template is on, the tokenizer has none",
            "task.chat_template=false",
        )
        if ours.chat_template:
            yield turns(ours)
    yield prompts_fit(config, model, ours)


def unknown_ids(model: Path, tokenizer: PreTrainedTokenizerBase, *, barred: bool) -> Check:
    """Rows of the model that are no id of the tokenizer: a sampled one is in the loss, yet in no text that a reward reads."""
    rows = int(text_config(model)["vocab_size"])
    unknown = UnknownIds.of(tokenizer, rows)
    if barred:
        return judged(
            "ids without text", not unknown.between, unknown.describe(rows) + "; barred", "bar_unknown_ids=false"
        )
    note = "rollout.bar_unknown_ids=true bars those behind the last one, on both sides" if unknown.behind else ""
    return Check("ids without text", "ok", unknown.describe(rows), note)


def unknown_sampled(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> Check:
    """Of the tokens sampled just now, those that no text has."""
    known = set(tokenizer.get_vocab().values())
    sampled = [t for rollout in rollouts for t in rollout.token_ids[rollout.prompt_length :]]
    strange = sum(t not in known for t in sampled)
    note = "masks count them, rewards read a text without them; rollout.bar_unknown_ids=true" if strange else ""
    return Check("ids without text, sampled", "ok", f"{strange} of {len(sampled)} sampled tokens", note)


def turns(tokenizer: PreTrainedTokenizerBase) -> Check:
    """The prefix law on a conversation of two answers, one with thinking: costs nothing here, where prompts have one turn."""
    breaches = check_prefix_law(tokenizer, CONVERSATION)
    if not breaches:
        return Check(
            "chat template over turns", "ok", "the next prompt begins with the ids of the last one and its answer"
        )
    note = "prompts of this run have one turn; over several, carry ids (rlalign.tasks.prefix_law.extend)"
    return Check("chat template over turns", "ok", breaches[0].message(), note)


def prompts_fit(config: RunConfig, model: Path, tokenizer: PreTrainedTokenizerBase) -> Check:
    """Every prompt of the run, training and held out, against the room and the model's rows."""
    task = load_task_of(config)
    prompts = [*task.train, *task.held_out]
    lengths: list[int] = []

    def ids_of(text: str) -> list[int]:
        ids = encode(tokenizer, text, chat=config.task.chat_template)
        lengths.append(len(ids))
        return ids

    bad = assembly.unfit(prompts, config, ids_of, int(text_config(model)["vocab_size"]))
    room = config.rollout.max_model_len - config.rollout.max_tokens
    found = f"longest of {len(prompts)} prompts {max(lengths)} tokens, room for {room}"
    if bad:
        found = assembly.describe_unfit(bad, len(prompts), config)
    if bad and config.task.unusable_prompts == "drop":
        return Check("prompt length", "ok", f"{found}; they are dropped")
    remedy = "raise rollout.max_model_len, lower rollout.max_tokens, or task.unusable_prompts=drop"
    return judged("prompt length", not bad, found, remedy)


def identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits of vocabulary, special tokens and chat template: equal on both sides, or text means other tokens."""
    special = {name: str(value) for name, value in sorted(tokenizer.special_tokens_map.items())}
    special.pop("pad_token", None)  # never given to a model; ours stands in with eos where the folder has none
    parts = [sorted(tokenizer.get_vocab().items()), special, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def special_tokens(model: Path, tokenizer: PreTrainedTokenizerBase) -> Check:
    """The ids that end, begin and pad a sequence: the tokenizer's against the checkpoint's config and generation config."""
    wrong = []
    for file in ("config.json", "generation_config.json"):
        if not (model / file).is_file():
            continue
        stored = json.loads((model / file).read_text())
        for name in SPECIAL:
            ids = stored.get(name)
            allowed = ids if isinstance(ids, list) else [ids]
            ours = getattr(tokenizer, name)
            if ids is not None and ours is not None and ours not in allowed:
                wrong.append(f"{name} {ours} in the tokenizer, {ids} in {file}")
    ids = ", ".join(f"{name.removesuffix('_token_id')} {getattr(tokenizer, name)}" for name in SPECIAL)
    return judged(
        "special tokens",
        not wrong,
        "; ".join(wrong) or f"{ids}, as the checkpoint says",
        "take tokenizer and config files from one checkpoint; a wrong eos ends or never ends completions",
    )


def both_sides(trainer: PreTrainedTokenizerBase, engine: PreTrainedTokenizerBase) -> Check:
    """The tokenizer that the trainer encodes prompts with against the one inside the engine."""
    ours, theirs = identity(trainer), identity(engine)
    if ours == theirs:
        return Check("tokenizer of both sides", "ok", f"the same: {ours}")
    mine, other = trainer.get_vocab(), engine.get_vocab()
    moved = sorted(t for t in mine.keys() | other.keys() if mine.get(t) != other.get(t))
    named = ", ".join(f"{t!r} {mine.get(t)} against {other.get(t)}" for t in moved[:3])
    what = f"{len(moved)} tokens differ: {named}" if moved else "special tokens or chat template differ"
    return Check("tokenizer of both sides", "problem", what, "start both sides from one folder")


def round_trip(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> Check:
    """Sampled ids against the ids of their own text: a trainer that re-tokenises text would train on other tokens."""
    special = set(tokenizer.all_special_ids)
    changed = 0
    for rollout in rollouts:
        sampled = [t for t in rollout.token_ids[rollout.prompt_length :] if t not in special]
        changed += sampled != tokenizer.encode(rollout.text, add_special_tokens=False)
    note = "rlalign carries token ids, so it costs nothing here; never re-tokenise text" if changed else ""
    return Check(
        "tokenisation round trip", "ok", f"{changed} of {len(rollouts)} completions re-encode to other ids", note
    )
