"""train_reward_model(): from verified samples or preferences to a reward model's folder, judged and calibrated.

    rows = read_rows(Path("samples.jsonl"))
    train_reward_model(rows, base=Path("my/policy"), out=Path("runs/rm"), objective="pairs", recipe=Recipe())

The folder is an ordinary sequence classifier that transformers, vLLM and SGLang serve. Beside the weights lie what it scored
on prompts it never saw (scores.jsonl), the calibration fitted on them (calibration.json) and the record of the training
(reward_model.json). Rows are in `examples`; network, losses and the optimisation in `fit`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from rlalign.calibration.calibrators import Calibrator, PlattCalibrator, TemperatureCalibrator
from rlalign.calibration.calibrators.cross_fit import ScoreRows, fit_and_hear, read_score_rows
from rlalign.calibration.metrics import auroc, negative_log_likelihood
from rlalign.reward.mixture import logits_by
from rlalign.reward.training.examples import Labelled, Pair, Row, pairs_of, read_rows, split, write_rows
from rlalign.reward.training.fit import Item, Recipe, accumulation, fit, load, tokenised
from rlalign.scoring.calibrated import identity_of
from rlalign.scoring.hf import HFScorer

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


__all__ = [
    "OBJECTIVES", "Labelled", "Pair", "Recipe", "pairs_of", "read_rows", "split", "train_reward_model", "write_rows",
]  # fmt: skip

OBJECTIVES = ("pairs", "labels")  # Bradley-Terry; binary cross entropy
RECORD = "reward_model.json"


def train_reward_model(
    rows: Sequence[Row],
    *,
    base: Path,
    out: Path,
    objective: str,
    recipe: Recipe,
    pairs_per_prompt: int = 8,
    save_dtype: str = "auto",
    model_id: str = "",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train, save, judge on held-out prompts, calibrate; the record, which is also in the folder.

    base: a causal language model, or a reward model to go on with. out: must not exist. objective: "pairs" (labelled rows are
    paired, right against wrong of one prompt) or "labels". save_dtype: of the weights; "auto" is the base's.
    model_id: what scorers will call it, for the calibration; the folder's path by default.
    Under `accelerate launch` every process calls this; the first one writes. Raises ValueError for whatever the user can
    repair, RuntimeError when the loss is not finite.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r}: choose one of {', '.join(OBJECTIVES)}")
    if out.exists():
        raise ValueError(f"{out} exists; choose another folder, nothing is overwritten")
    training, held_out = split(cast("Sequence[Any]", rows), held_out=recipe.held_out, seed=recipe.seed)
    learned = _rows_for(objective, training, pairs_per_prompt, recipe.seed)
    accelerator = _accelerator(recipe)
    network, tokenizer = load(base, seed=recipe.seed)
    if recipe.gradient_checkpointing:
        network.model.gradient_checkpointing_enable()
    items = _items(learned, tokenizer, recipe, str(base))
    say = say if accelerator.is_main_process else (lambda _: None)
    say(f"{len(items)} {objective} to learn from, {len(learned) - len(items)} too long; {len(held_out)} rows held out")
    steps = fit(network, items, recipe, accelerator, pad=cast("int", tokenizer.pad_token_id), say=say)
    record: dict[str, Any] = {
        "base": str(base),
        "objective": objective,
        "recipe": asdict(recipe),
        "rows": {"trained": len(items), "too_long": len(learned) - len(items), "held_out": len(held_out)},
        "steps": steps,
        "versions": {name: version(name) for name in ("rlalign", "torch", "transformers", "accelerate")},
    }
    if accelerator.is_main_process:
        _save(network.model, tokenizer, out, dtype=save_dtype, base=base)
        record |= {"quality": judge(out, held_out, chat=recipe.chat_template, model_id=model_id)}
        say(f"{out}: {record['quality']}")
        (out / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    accelerator.wait_for_everyone()
    return record


def _accelerator(recipe: Recipe) -> Accelerator:
    """One process, or data parallel ones; bf16 arithmetic on GPUs that have it, with float32 weights."""
    import torch
    from accelerate import Accelerator, PartialState

    cpu = not torch.cuda.is_available()  # without being told so, accelerate takes CPU ranks for runs of their own
    processes = PartialState(cpu=cpu).num_processes
    if processes != (launched := int(os.environ.get("WORLD_SIZE", "1"))):
        raise RuntimeError(
            f"the launcher started {launched} processes, accelerate sees {processes}: each would train for itself"
        )
    accelerator = Accelerator(
        cpu=cpu,
        gradient_accumulation_steps=accumulation(recipe, processes),
        mixed_precision="no" if cpu or not torch.cuda.is_bf16_supported() else "bf16",
    )
    if accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise ValueError(
            f"accelerate is set up for {accelerator.distributed_type.value}; this trainer runs in one process or data parallel"
        )
    return accelerator


def _rows_for(objective: str, rows: Sequence[Row], pairs_per_prompt: int, seed: int) -> Sequence[Row]:
    if isinstance(rows[0], Labelled) and objective == "pairs":
        return pairs_of([row for row in rows if isinstance(row, Labelled)], per_prompt=pairs_per_prompt, seed=seed)
    if isinstance(rows[0], Pair) and objective == "labels":
        raise ValueError("objective=labels needs labelled completions; preferences say only which one is better")
    return rows


def _items(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, model: str) -> list[Item]:
    """Rows with their token ids; those with a sequence longer than max_length are left out."""
    texts = [(row.prompt, text) for row in rows for text in row.texts]
    ids = iter(tokenised(tokenizer, texts, max_length=recipe.max_length, chat=recipe.chat_template, model=model))
    found = []
    for row in rows:
        sequences = tuple(kept for kept in [next(ids) for _ in row.texts] if kept is not None)
        if len(sequences) == len(row.texts):
            found.append(Item(row=row, sequences=sequences))
    return found


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, *, dtype: str, base: Path) -> None:
    """The folder appears whole or not at all."""
    import torch
    from transformers import AutoConfig

    stated = AutoConfig.from_pretrained(base).dtype if dtype == "auto" else getattr(torch, dtype)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.partial")
    torch.nn.Module.to(model, stated or torch.float32)  # in place
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    out.parent.mkdir(parents=True, exist_ok=True)
    os.rename(unfinished, out)


SCORES, CALIBRATION = "scores.jsonl", "calibration.json"


def judge(folder: Path, held_out: Sequence[Row], *, chat: bool = False, model_id: str = "") -> dict[str, Any]:
    """Score held-out rows, write scores.jsonl and calibration.json into the folder, and return what they say.

    A soft label counts as right from one half. Rows that cannot be scored are counted. A model whose scores fall with success
    gets no calibration, and the record says why.
    """
    scorer = HFScorer(str(folder.resolve()), device="cuda" if torch.cuda.is_available() else "cpu")
    answers = iter(logits_by(scorer, chat=chat)([(row.prompt, text) for row in held_out for text in row.texts]))
    scored = [(row, [next(answers) for _ in row.texts]) for row in held_out]
    numbers = [(row, [n for n in given if not isinstance(n, str)]) for row, given in scored]
    usable = [(row, found) for row, found in numbers if len(found) == len(row.texts)]
    if not usable:
        raise RuntimeError(f"none of {len(held_out)} held-out rows could be scored; the first reason: {scored[0][1]}")
    with (folder / SCORES).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(_line(row, found)) + "\n" for row, found in usable)
    rows = read_score_rows(folder / SCORES)
    found = _quality(rows) | {"held_out_scored": len(usable), "held_out_unscored": len(held_out) - len(usable)}
    calibrator: Calibrator = TemperatureCalibrator() if rows.shape == "pairs" else PlattCalibrator()
    try:
        said = fit_and_hear(calibrator, rows)
    except ValueError as error:
        return found | {"calibration": None, "calibration_refused": str(error)}
    identity = identity_of(scorer.info)
    calibrator.save(folder / CALIBRATION, model=replace(identity, id=model_id or identity.id))
    return found | {"calibration": calibrator.calibration_id, "calibration_warnings": said}


def _line(row: Row, numbers: Sequence[float]) -> dict[str, Any]:
    line = {"weight": row.weight, "group": row.prompt}
    if isinstance(row, Pair):
        return {"chosen": numbers[0], "rejected": numbers[1]} | line
    return {"logit": numbers[0], "label": float(row.label >= 0.5)} | line


def _quality(rows: ScoreRows) -> dict[str, Any]:
    """Held-out pairs: accuracy. Labelled rows: AUROC, accuracy within prompts, NLL (nats) of the uncalibrated sigmoid."""
    if rows.shape == "pairs":
        margin_N = rows.logits[:, 0] - rows.logits[:, 1]
        return {"pair_accuracy": float(np.average((margin_N > 0) + 0.5 * (margin_N == 0), weights=rows.weight_N))}
    p_N = 1 / (1 + np.exp(-rows.logits))
    both = len(np.unique(rows.labels)) == 2
    return {
        "nll": negative_log_likelihood(p_N, rows.labels, sample_weight=rows.weight_N),
        "right": float(rows.labels.mean()),
        "auroc": auroc(rows.logits, rows.labels, sample_weight=rows.weight_N) if both else None,
    }
