"""What `rlalign replay` needs of a step: RUN/replay/step-NNNNNN with the weights that sampled it and every number about its tokens.

model/ is an ordinary Hugging Face folder with its tokenizer. batch.safetensors is written last: a step without it is unfinished.
Suffixes: B sequences, L padded length, V vocabulary, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.types import KeptSets, LogprobSpec, RolloutBatch

if TYPE_CHECKING:
    from torch import Tensor

FOLDER, MODEL, BATCH, MASTER = "replay", "model", "batch.safetensors", "master_lm_head.safetensors"
FORMAT = 1
KEY = "rlalign_replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedStep:
    """One step as it was. version: the trainer's when it scored the batch; trainer_ranks: processes that shared its rows.

    master_VD: the unrounded fp32 lm_head of a run with head_dtype=master, else None.
    """

    step: int
    version: int
    trainer_ranks: int
    model: Path
    batch: RolloutBatch
    old_logprobs_BL: Tensor
    master_VD: Tensor | None


def folder_of(run: Path, step: int) -> Path:
    """Where a step lies."""
    return run / FOLDER / f"step-{step:06d}"


def save_weights(run: Path, step: int, *, save: Callable[[Path], None], master_VD: Tensor | None) -> None:
    """The weights as they are now. save: writes a Hugging Face folder; with several trainer ranks each must call this."""
    from rlalign import ranks

    folder = folder_of(run, step)
    ranks.on_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    save(folder / MODEL)
    if master_VD is not None and ranks.rank() == 0:
        from safetensors.torch import save_file

        save_file({"master_VD": master_VD.detach().cpu().contiguous()}, folder / MASTER)


def save_batch(
    run: Path, step: int, batch: RolloutBatch, old_logprobs_BL: Tensor, *, version: int, trainer_ranks: int
) -> None:
    """The step's tokens and both sides' logprobs, bit for bit."""
    from safetensors.torch import save_file

    tensors = {name: tensor.cpu().contiguous() for name, tensor in batch.tensors().items()}
    if batch.kept is not None:
        tensors |= {"kept_ids_E": batch.kept.ids_E, "kept_count_BL": batch.kept.count_BL}
    tensors["old_logprobs_BL"] = old_logprobs_BL.cpu().contiguous()
    about = {"format": FORMAT, "step": step, "version": version, "trainer_ranks": trainer_ranks}
    metadata = {KEY: json.dumps(about | {"spec": asdict(batch.spec)})}
    folder = folder_of(run, step)
    save_file(tensors, folder / f".{BATCH}", metadata=metadata)
    (folder / f".{BATCH}").rename(folder / BATCH)


def saved_steps(run: Path) -> list[int]:
    """The steps of a run that can be replayed, in order."""
    return sorted(int(file.parent.name.removeprefix("step-")) for file in (run / FOLDER).glob(f"step-*/{BATCH}"))


def read_step(run: Path, step: int) -> SavedStep:
    """A step that was saved whole. Raises ValueError saying which steps were, and how to save more."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    folder = folder_of(run, step)
    if not (folder / BATCH).is_file():
        raise ValueError(_why_not(run, step))
    try:
        with safe_open(folder / BATCH, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(KEY, "{}"))
        tensors = load_file(folder / BATCH)
    except SafetensorError as error:
        raise ValueError(f"{folder / BATCH} is damaged: {error}") from error
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{folder}: saved in format {about.get('format')!r}, this rlalign reads {FORMAT}; replay it with the rlalign that "
            "wrote it (environment.json names it)"
        )
    master = load_file(folder / MASTER)["master_VD"] if (folder / MASTER).is_file() else None
    old_BL = tensors.pop("old_logprobs_BL")
    sets = {
        name.removeprefix("kept_"): tensors.pop(name) for name in ("kept_ids_E", "kept_count_BL") if name in tensors
    }
    kept = KeptSets(**sets) if sets else None
    return SavedStep(
        step=about["step"],
        version=about["version"],
        trainer_ranks=about["trainer_ranks"],
        model=folder / MODEL,
        batch=RolloutBatch(**tensors, spec=LogprobSpec(**about["spec"]), kept=kept),
        old_logprobs_BL=old_BL,
        master_VD=master,
    )


def _why_not(run: Path, step: int) -> str:
    saved = saved_steps(run)
    if folder_of(run, step).is_dir():
        return f"{folder_of(run, step)}: the run ended before this step was saved whole; saved steps: {_listed(saved)}"
    have = f"steps that can be replayed: {_listed(saved)}" if saved else "it saved none"
    return (
        f"{run}: the weights of step {step} were not saved ({have}). "
        "Train with tracking.replay_every=N to save every N-th step (1: all), and the one that stops a run"
    )


def _listed(steps: list[int]) -> str:
    shown = ", ".join(map(str, steps[:12])) or "none"
    return shown + (f", ... {steps[-1]}" if len(steps) > 12 else "")
