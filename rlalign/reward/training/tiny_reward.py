"""The demo's reward model: a tiny policy's own samples, verified, and a reward model trained on them; cached."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from rlalign.ranks import environment_without_launcher
from rlalign.reward.training import RECORD, Labelled, Recipe, train_reward_model, write_rows
from rlalign.tasks import load_task
from rlalign.tiny_policy import cache_root, make_tiny_policy
from rlalign.tiny_policy.teaching import TinyRecipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlalign.tasks import Prompt

    Progress = Callable[[str], None]

RECIPE_VERSION = 1  # raised whenever this file makes another model from the same recipe
SAMPLES, FOLDER = "samples.jsonl", "reward_models"


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyRewardRecipe:
    """Everything that decides which reward model comes out.

    samples: completions of each of the policy's training prompts, at temperature 1. max_tokens: of one completion.
    """

    policy: TinyRecipe = field(default_factory=TinyRecipe)
    samples: int = 8
    max_tokens: int = 6
    objective: str = "pairs"
    pairs_per_prompt: int = 8
    training: Recipe = field(
        default_factory=lambda: Recipe(
            epochs=2, batch_size=128, micro_batch_size=128, learning_rate=1e-3, max_length=64, held_out=0.1
        )
    )

    @property
    def folder(self) -> str:
        """The cache folder's name, which carries a hash of every field."""
        key = json.dumps([RECIPE_VERSION, self.policy.folder, asdict(self)], sort_keys=True)
        kind = "tied" if self.policy.tied else "untied"
        return f"tiny-reward-{kind}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def cached_reward_model(kind: str, *, report: Progress = lambda _: None) -> Path:
    """The folder of the default reward model of a tiny policy, "untied" or "tied".

    Made in a process of its own, without the launcher's variables: accelerate would take the ranks of the run for its own.
    Raises ValueError on another kind, RuntimeError when that process fails.
    """
    if kind not in ("untied", "tied"):
        raise ValueError(f"unknown tiny reward model {kind!r}; choose untied or tied")
    folder = cache_root().parent / FOLDER / TinyRewardRecipe(policy=TinyRecipe(tied=kind == "tied")).folder
    if (folder / RECORD).is_file():
        return folder
    command = [sys.executable, "-m", "rlalign.reward.training.tiny_reward", kind]
    with tempfile.TemporaryFile("w+") as errors:
        alone = environment_without_launcher()
        with subprocess.Popen(command, env=alone, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            for line in process.stdout or ():
                report(line.rstrip())
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed with {process.returncode}: {errors.read()[-2000:]}")
    return folder


def make_tiny_reward_model(root: Path, recipe: TinyRewardRecipe, *, progress: Progress = lambda _: None) -> Path:
    """The folder that `recipe` describes under root; sampled, verified and trained if it is not there yet.

    The samples lie in it as samples.jsonl. Raises as `make_tiny_policy` and `train_reward_model`.
    """
    folder = root / FOLDER / recipe.folder
    if (folder / RECORD).is_file():
        return folder
    policy = make_tiny_policy(root / "policies", recipe.policy, progress=progress)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{recipe.folder}-", dir=folder.parent))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # makes the model a function of the recipe
    try:
        progress(f"tiny reward model: sampling {recipe.samples} completions of {recipe.policy.train_size} prompts")
        rows = verified_samples(policy, recipe)
        progress(f"tiny reward model: {len(rows)} verified samples, {sum(r.label for r in rows) / len(rows):.0%} right")
        train_reward_model(
            rows, base=policy, out=work / "model", objective=recipe.objective, recipe=recipe.training,
            pairs_per_prompt=recipe.pairs_per_prompt, save_dtype="float32", model_id=str(folder.resolve()),
            say=lambda line: progress(f"tiny reward model: {line}"),
        )  # fmt: skip
        write_rows(work / "model" / SAMPLES, rows)
        try:
            os.rename(work / "model", folder)
        except OSError:
            if not (folder / RECORD).is_file():  # else another process was faster, with the same model
                raise
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(work, ignore_errors=True)
    return folder


def verified_samples(policy: Path, recipe: TinyRewardRecipe) -> list[Labelled]:
    """The policy's completions of its own training prompts, each with the verifier's word. Empty ones are left out."""
    source = recipe.policy
    task = load_task(
        source.task, source.task_params, train_size=source.train_size, eval_size=source.eval_size, seed=source.seed
    )
    prompts = [prompt for prompt in task.train for _ in range(recipe.samples)]
    return [
        Labelled(prompt=prompt.text, completion=text, label=task.reward(prompt, text))
        for prompt, text in zip(prompts, _sampled(policy, prompts, recipe), strict=True)
        if text
    ]


def _sampled(policy: Path, prompts: list[Prompt], recipe: TinyRewardRecipe, *, at_once: int = 1024) -> list[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, max_new_tokens=recipe.max_tokens,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    texts: list[str] = []
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(recipe.policy.seed)
        for start in range(0, len(prompts), at_once):
            batch = tokenizer([p.text for p in prompts[start : start + at_once]], padding=True, return_tensors="pt")
            written = cast("Any", model).generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=settings
            )
            texts += tokenizer.batch_decode(written[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


if __name__ == "__main__":
    make_tiny_reward_model(
        cache_root().parent,
        TinyRewardRecipe(policy=TinyRecipe(tied=sys.argv[1] == "tied")),
        progress=lambda line: print(line, flush=True),
    )
