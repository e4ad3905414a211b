"""make_tiny_policy(): a Qwen3 policy small enough for one CPU thread, taught arithmetic until it is sometimes right.

RL needs a policy that solves a part of its task. This one is an ordinary Hugging Face folder (bf16 safetensors, a
byte-level BPE tokenizer) that transformers and vLLM load, trained from nothing in seconds on the train split of a task.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rlalign.cache_folder import cache_folder
from rlalign.tasks import load_task
from rlalign.tiny_policy.teaching import Progress, TinyRecipe, accuracy, teach
from rlalign.tiny_policy.tokenizer import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

__all__ = ["cache_root", "cached_policy", "make_tiny_policy"]


RECORD = "tiny_policy.json"


def cached_policy(kind: str, *, report: Progress = lambda _: None) -> Path:
    """The folder of the default policy, "untied" or "tied", in this user's cache. Raises ValueError on another kind."""
    if kind not in ("untied", "tied"):
        raise ValueError(f"unknown tiny policy {kind!r}; choose untied or tied")
    return make_tiny_policy(cache_root(), TinyRecipe(tied=kind == "tied"), progress=report)


def cache_root() -> Path:
    """Where policies are kept unless a caller says otherwise: under $RLALIGN_CACHE, or ~/.cache/rlalign."""
    return cache_folder("policies")


def make_tiny_policy(out_root: Path, recipe: TinyRecipe, *, progress: Progress = lambda _: None) -> Path:
    """The folder of the policy that `recipe` describes; trained if `out_root` does not hold it yet.

    The folder appears whole or not at all: it is written beside its place and renamed. What it scored lies in its
    tiny_policy.json. Raises RuntimeError when max_steps do not reach accept_from, ValueError on a bad task.
    """
    folder = out_root / recipe.folder
    if _is_finished(folder, recipe):
        progress(f"tiny policy: {folder} is there already")
        return folder
    out_root.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{recipe.folder}-", dir=out_root))
    unfinished.chmod(0o755)  # mkdtemp's 0o700 would stay with the finished folder
    try:
        _build(unfinished, recipe, progress)
        if folder.exists() and not _is_finished(folder, recipe):
            shutil.rmtree(folder)  # torn by something else than this function
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not _is_finished(folder, recipe):  # else another process was faster, with the same policy
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _is_finished(folder: Path, recipe: TinyRecipe) -> bool:
    """The record is written last: with it, everything is there."""
    record = folder / RECORD
    needed = [folder / "config.json", folder / "model.safetensors", folder / "tokenizer.json"]
    if not all(path.is_file() for path in (record, *needed)):
        return False
    return json.loads(record.read_text())["recipe"] == asdict(recipe)


def _build(folder: Path, recipe: TinyRecipe, progress: Progress) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    task = load_task(
        recipe.task, recipe.task_params, train_size=recipe.train_size, eval_size=recipe.eval_size, seed=recipe.seed
    )
    tokenizer = byte_tokenizer(recipe.context)
    with _one_seeded_thread(recipe.seed), _no_progress_bars():
        begin = time.monotonic()
        model = _new_model(recipe, tokenizer)
        steps = teach(model, tokenizer, task, recipe, progress)
        seconds = time.monotonic() - begin
        torch.nn.Module.to(model, torch.bfloat16)  # in place
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        saved = cast("Qwen3ForCausalLM", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
        sampled = accuracy(saved, tokenizer, task, greedy=False)
        greedy = accuracy(saved, tokenizer, task, greedy=True)
    size = sum(parameter.numel() for parameter in saved.parameters())
    progress(
        f"tiny policy: {size / 1e6:.2f} M parameters, {steps} steps in {seconds:.1f} s; held-out accuracy "
        f"{sampled:.2f} sampled, {greedy:.2f} greedy"
    )
    record = {"recipe": asdict(recipe), "steps": steps, "seconds": seconds, "sampled": sampled, "greedy": greedy}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


@contextmanager
def _one_seeded_thread(seed: int) -> Iterator[None]:
    """One thread makes the result a function of the recipe; the caller's thread count and generator are put back."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws a bar per file it writes or reads; ours is the only progress worth a line."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _new_model(recipe: TinyRecipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,  # engines pad to 64: nothing is left to pad
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=recipe.tied,
        initializer_range=recipe.initializer_range,
        pad_token_id=cast("int", tokenizer.pad_token_id),
        bos_token_id=cast("int", tokenizer.bos_token_id),
        eos_token_id=cast("int", tokenizer.eos_token_id),
    )
    return Qwen3ForCausalLM(config)
