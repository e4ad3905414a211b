"""The tokens to attribute on: a saved step of a run, or completions of prompts sampled now.

Suffixes: B sequences, L padded length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from rlalign.config import Dtype, HeadDtype, ModelConfig, RolloutConfig, RunConfig
from rlalign.diagnose.both_sides import ask_about_weights, task_prompts
from rlalign.rollout.engine.embedded import VLLMEngine
from rlalign.run.assembly import encode, load_task_of, load_tokenizer, resolve_model
from rlalign.tracking.record import config_of, read_run
from rlalign.tracking.token_files import read_loop, read_step, read_tokens, saved_steps
from rlalign.types import LogprobSpec, Rollout, RolloutBatch, collate

COLUMNS = ("sequence", "position", "token_id", "rollout_logprob", "policy_version", "prompt_id", "group_id")


@dataclass(frozen=True, slots=True)
class Source:
    """model: the folder both sides load; batch: None when the engine is to sample it first; notes: what a reader must know."""

    config: RunConfig
    model: Path
    batch: RolloutBatch | None
    notes: tuple[str, ...] = ()


def of_run(directory: Path, step: int | None, tokens: int) -> Source:
    """A step of a run: with the weights that sampled it where the run saved them, else with its initial weights.

    step: None for the last one saved. Raises ValueError for a directory of another version, a step without tokens, and
    prompts that are no longer those of the run. The directory may also be one that `rlalign.write_tokens` kept whole steps in.
    """
    if (loop := read_loop(directory)) is not None:
        return _of_loop(directory, loop, step, tokens)
    record = read_run(directory)
    config = config_of(record)
    saved = saved_steps(directory)
    if saved and (step is None or step in saved):
        found = read_step(directory, saved[-1] if step is None else step)
        spec = LogprobSpec(temperature=found.batch.spec.temperature, head_dtype=found.batch.spec.head_dtype)
        batch = budget(replace(found.batch, spec=spec, kept=None), tokens)
        return Source(_over_all_ids(config), found.model, batch, (f"step {found.step}, its own weights",))
    files = {int(file.stem.removeprefix("step-")): file for file in record.token_files}
    if not files or (step is not None and step not in files):
        have = f"steps with tokens: {sorted(files)}, with weights too: {saved}" if files else "the run saved no tokens"
        raise ValueError(
            f"{directory}: no tokens of step {step}; {have}. Train with tracking.tokens_every or replay_every"
        )
    chosen = max(files) if step is None else step
    model = resolve_model(config.model.path)
    batch = budget(_from_tokens(files[chosen], config, model), tokens)
    return Source(
        _over_all_ids(config),
        model,
        batch,
        (f"tokens of step {chosen}, but the weights are {config.model.path}: the run did not save the step's",),
    )


def _of_loop(directory: Path, loop: dict[str, str], step: int | None, tokens: int) -> Source:
    """A step of somebody else's loop, with the weights that it wrote beside the tokens."""
    saved = saved_steps(directory)
    if not saved:
        raise ValueError(
            f"{directory}: a loop of one's own wrote its sampled tokens here, not the prompts before them and not the weights. "
            "Give rlalign.write_tokens also monitor, tokenizer and attention_mask_BL, at the steps to attribute; "
            f"`rlalign mismatch {directory}/tokens` reads what there is"
        )
    found = read_step(directory, saved[-1] if step is None else step)
    about = found.batch.spec
    batch = replace(
        found.batch, spec=LogprobSpec(temperature=about.temperature, head_dtype=about.head_dtype), kept=None
    )
    length = batch.token_ids_BL.shape[1] + 16
    config = RunConfig(
        head_dtype=HeadDtype(loop["head_dtype"]), model=ModelConfig(path=str(found.model), dtype=Dtype(loop["dtype"])),
        rollout=RolloutConfig(temperature=about.temperature, max_model_len=length, max_tokens=length - 1, enforce_eager=True),
    )  # fmt: skip
    notes = (f"step {found.step} of a loop of one's own, its weights rounded to {loop['dtype']}",)
    return Source(_over_all_ids(config), found.model, budget(batch, tokens), notes)


def of_config(config: RunConfig) -> Source:
    """Completions of the task's or the user's prompts, sampled by the engine once it runs."""
    return Source(_over_all_ids(config), resolve_model(config.model.path), None)


def _over_all_ids(config: RunConfig) -> RunConfig:
    """Both sides are forced through given tokens, so nothing is truncated."""
    return replace(config, rollout=config.rollout.over_all_ids())


def sampled(
    engine: VLLMEngine, source: Source, *, prompt_file: Path | None, prompts: int, samples: int, tokens: int
) -> RolloutBatch:
    """Prompts through the live engine, within the budget."""
    tokenizer = load_tokenizer(source.model)
    ids = task_prompts(tokenizer, source.config, count=prompts, file=prompt_file)
    rollouts = engine.generate(ids, prompt_ids=range(len(ids)), samples=samples, seed=source.config.seed)
    return budget(collate(rollouts, pad_token_id=tokenizer.pad_token_id, spec=engine.spec), tokens)


def budget(batch: RolloutBatch, tokens: int) -> RolloutBatch:
    """The first sequences that fit into so many tokens, and at least one; the padding is cut to the longest of them."""
    lengths_B = batch.attention_mask_BL.sum(1)
    count = max(1, int((lengths_B.cumsum(0) <= tokens).sum()))
    return batch.rows(slice(0, count), int(lengths_B[:count].max()))


def _from_tokens(file: Path, config: RunConfig, model: Path) -> RolloutBatch:
    """Rollouts from the sampled tokens of a token file and the task's prompts."""
    table = read_tokens(file)
    if missing := set(COLUMNS) - set(table.column_names):
        raise ValueError(f"{file} lacks the columns {sorted(missing)}: it is of another version of rlalign")
    tokenizer = load_tokenizer(model)
    prompts = {p.prompt_id: p.text for p in load_task_of(config).train}
    by_sequence: dict[int, list[dict]] = {}
    for row in table.select(COLUMNS).to_pylist():
        by_sequence.setdefault(row["sequence"], []).append(row)
    rollouts = []
    for rows in by_sequence.values():
        text = prompts.get(rows[0]["prompt_id"])
        prompt = None if text is None else encode(tokenizer, text, chat=config.task.chat_template)
        if prompt is None or [row["position"] for row in rows] != list(range(len(prompt), len(prompt) + len(rows))):
            raise ValueError(
                f"{file}: sequence {rows[0]['sequence']} does not continue prompt {rows[0]['prompt_id']} of task "
                f"{config.task.name!r}: task or tokenizer have changed since the run, or its turns were not sampled in one piece"
            )
        rollouts.append(_rollout(prompt, rows))
    spec = LogprobSpec(temperature=config.rollout.temperature, head_dtype=config.head_dtype.value)
    return collate(rollouts, pad_token_id=tokenizer.pad_token_id, spec=spec)


def _rollout(prompt: Sequence[int], rows: Sequence[dict]) -> Rollout:
    start, end = len(prompt), len(prompt) + len(rows)
    return Rollout(
        token_ids=[*prompt, *(row["token_id"] for row in rows)],
        loss_mask=[False] * start + [True] * len(rows),
        rollout_logprobs=[0.0] * start + [row["rollout_logprob"] for row in rows],
        prompt_id=rows[0]["prompt_id"],
        group_id=rows[0]["group_id"],
        finish_reason="",
        version_spans=[(start, end, rows[0]["policy_version"])],
    )


SHOWN = 6  # names in a message


def require_same_weights(engine: VLLMEngine, network: nn.Module, shared: Path, *, anyway: bool) -> list[str]:
    """Notes for the reader. shared: a folder that every rollout rank can read, for one copy of the weights.

    Raises RuntimeError naming the tensors that differ, unless `anyway`: then a note says so.
    """
    answers = ask_about_weights(engine, network, "rlalign_differing_weights", shared)
    differ = sorted({name for answer in answers for name in answer["differ"]})
    unknown = sorted({name for answer in answers for name in answer["unknown"]})
    notes = []
    if unknown:
        notes.append(f"weights not compared, the engine holds them in another form: {_listed(unknown)}")
    if differ:
        said = f"the two sides hold different weights: {len(differ)} tensors, {_listed(differ)}"
        if not anyway:
            raise RuntimeError(
                f"mismatched checkpoints: {said}. Load the same, or attribute the difference with --any-weights"
            )
        notes.append(said)
    return notes


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
