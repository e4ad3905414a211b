"""GRPO against a reward model that learned from too few labels: with its first calibration, and with refits."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rlalign.calibration.calibrators import Calibrator, PlattCalibrator
from rlalign.calibration.metrics import auroc
from rlalign.reward.mixture import logits_by
from rlalign.reward.training import Labelled, Recipe, train_reward_model
from rlalign.scoring.hf import HFScorer
from rlalign.tasks import Prompt, Task, load_task
from rlalign.tiny_policy import cached_policy
from rlalign.tiny_policy.teaching import TinyRecipe
from rlalign.tracking.record import RunRecord, read_run

TRAINED, CALIBRATED, SAMPLES = 400, 400, 8  # prompts, prompts, completions of each
STEPS, WINDOW = 60, 1024
TRAILING = 4  # steps of the verifier's mean, 1024 samples
COMMON = (
    "reward=tiny", "algo.normalize_std=false", "algo.kl_coef=0.02", f"reward.drift.window={WINDOW}",
    "tracking.wandb=disabled", "tracking.tokens_every=0", "overwrite=true",
)  # fmt: skip
RUNS = {"frozen": (), "refit": ("reward.drift.refit_every=3",)}


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A folder with its calibration, and what it is worth on the initial policy's completions."""

    folder: Path
    labels: int
    calibrated_on: int
    auroc: float


def reward_model(folder: Path) -> RewardModel:
    """Trained on completions of `TRAINED` prompts, calibrated on those of `CALIBRATED` others: at step 0 both are right.

    A folder that is there already is taken as it is.
    """
    if (about := folder / "about.json").exists():
        return RewardModel(folder=folder, **json.loads(about.read_text()))
    policy, recipe = cached_policy("untied", report=print), TinyRecipe()
    task = load_task(
        recipe.task, recipe.task_params, train_size=recipe.train_size, eval_size=recipe.eval_size, seed=recipe.seed
    )
    prompts = random.Random(0).sample(task.train, TRAINED + CALIBRATED)
    rows = _verified(policy, task, [prompt for prompt in prompts for _ in range(SAMPLES)])
    texts = {prompt.text for prompt in prompts[:TRAINED]}
    training, held = [r for r in rows if r.prompt in texts], [r for r in rows if r.prompt not in texts]
    recipe = Recipe(
        epochs=3, batch_size=64, micro_batch_size=64, learning_rate=1e-3, max_length=64, held_out=0.1
    )  # fmt: skip
    train_reward_model(
        training, base=policy, out=folder, objective="labels", recipe=recipe, save_dtype="float32", say=print
    )
    logits = np.array(logits_by(HFScorer(str(folder)))([(r.prompt, r.completion) for r in held]), dtype=float)
    labels = np.array([r.label for r in held])
    own = folder / "calibration.json"
    PlattCalibrator().fit(logits, labels).save(own, model=Calibrator.load(own).model_)
    found = {"labels": len(training), "calibrated_on": len(held), "auroc": auroc(logits, labels)}
    about.write_text(json.dumps(found))
    return RewardModel(folder=folder, **found)


def _verified(policy: Path, task: Task, prompts: list[Prompt], *, at_once: int = 1024) -> list[Labelled]:
    """One completion of each prompt by the initial policy at temperature 1, with the verifier's word."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    rows = []
    torch.manual_seed(0)
    for start in range(0, len(prompts), at_once):
        part = prompts[start : start + at_once]
        batch = tokenizer([p.text for p in part], padding=True, return_tensors="pt")
        with torch.inference_mode():
            written = model.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=True, temperature=1.0, top_k=0,
                max_new_tokens=6, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        for prompt, ids in zip(part, written[:, batch.input_ids.shape[1] :], strict=True):
            if text := tokenizer.decode(ids, skip_special_tokens=True):
                rows.append(Labelled(prompt=prompt.text, completion=text, label=task.reward(prompt, text)))
    return rows


def run(name: str, model: RewardModel, work: Path) -> None:
    """One run of the demo with this reward model instead of the verifier, which only watches; unless it is there already."""
    folder = work / name
    if folder.exists() and read_run(folder).status == "finished":
        return
    command = [
        str(Path(sys.executable).with_name("rlalign")), "train", "--config-name", "demo", *COMMON, *RUNS[name],
        f"reward.models.rm.path={model.folder}", f"name={name}", f"steps={STEPS}", f"output_dir={folder}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


@dataclass(frozen=True, kw_only=True)
class Story:
    """When what became visible. Steps; None: never.

    falls: the verifier's mean over the last TRAILING steps lies below the best such mean so far by more than three standard
    errors of the difference; below_start: likewise below that of the first TRAILING steps.
    """

    warn: int | None
    drift: int | None
    falls: int | None
    below_start: int | None
    rm: tuple[float, float]
    verifier: tuple[float, float, float]
    accuracy: tuple[float, float, float]
    calibrations: int


def story(record: RunRecord, samples: int) -> Story:
    """What the monitor said and when, beside when the verifier's score shows it. samples: of one step."""
    steps, verifier = record.series("reward/verifier/mean")
    _, rm = record.series("reward/rm/mean")
    at, states = record.series("reward/drift/rm/state")
    _, accuracy = record.series("eval/accuracy")
    trailing = [(steps[i], float(np.mean(verifier[i - TRAILING + 1 : i + 1]))) for i in range(TRAILING - 1, len(steps))]
    return Story(
        warn=next((int(s) for s, state in zip(at, states, strict=True) if state >= 1), None),
        drift=next((int(s) for s, state in zip(at, states, strict=True) if state == 2), None),
        falls=_first_below(trailing, samples, best=True),
        below_start=_first_below(trailing, samples, best=False),
        rm=(rm[0], rm[-1]),
        verifier=(trailing[0][1], max(mean for _, mean in trailing), trailing[-1][1]),
        accuracy=(accuracy[0], max(accuracy), accuracy[-1]),
        calibrations=1 + int(max(record.series("reward/drift/rm/calibration_version")[1])),
    )


def _first_below(trailing: list[tuple[float, float]], samples: int, *, best: bool) -> int | None:
    """Standard errors as if every prompt's completions were alike, which is the careful side."""
    prompts = TRAILING * samples / SAMPLES
    high = trailing[0][1]
    for step, mean in trailing[1:]:
        error = math.sqrt((mean * (1 - mean) + high * (1 - high)) / prompts)
        if high - mean > 3 * error:
            return int(step)
        high = max(high, mean) if best else high
    return None
