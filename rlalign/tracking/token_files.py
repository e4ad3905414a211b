"""Per-token files and what a replay needs: one parquet per sampled step, one row per token; weights and batches of saved steps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import rlalign
from rlalign.tracking.files import RUN, TOKENS, read_json, write_json
from rlalign.types import KeptSets, LogprobSpec, RolloutBatch, Routes

if TYPE_CHECKING:
    import pyarrow
    from torch import Tensor

# Nats for logprobs; position counts from the first prompt token; log_ratio = old_logprob - rollout_logprob.
# entropy: of the trainer's distribution, nats. lag: the trainer's version minus policy_version. kv_version: the oldest weights
# behind the keys and values the token was sampled with; -1 where the engine does not tell.
SCHEMA = {
    "step": "int32",
    "sequence": "int32",
    "position": "int32",
    "token_id": "int32",
    "token": "string",
    "rollout_logprob": "float32",
    "old_logprob": "float32",
    "log_ratio": "float32",
    "entropy": "float32",
    "policy_version": "int32",
    "lag": "int32",
    "kv_version": "int32",
    "prompt_id": "int64",
    "group_id": "int64",
    "reward": "float32",
    "advantage": "float32",
    "loss_mask": "bool",
}
DERIVED = ("step", "log_ratio")
SHOWN = (
    "token",
    "log_ratio",
    "rollout_logprob",
    "old_logprob",
    "entropy",
    "lag",
    "policy_version",
    "sequence",
    "position",
    "token_id",
)
Column = Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool] | np.ndarray


def write_tokens(path: Path, step: int, columns: Mapping[str, Column]) -> Path:
    """Write the file atomically. `step` and `log_ratio` may be left out; they follow from the rest.

    Raises ValueError for a missing or unknown column and for columns of different lengths.
    """
    import pyarrow
    import pyarrow.parquet

    missing, unknown = set(SCHEMA) - set(DERIVED) - set(columns), set(columns) - set(SCHEMA)
    if missing or unknown:
        raise ValueError(f"token columns: missing {sorted(missing)}, unknown {sorted(unknown)}; wanted {list(SCHEMA)}")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"token columns differ in length: {lengths}")
    given = dict(columns)
    given.setdefault("step", np.full(len(columns["token_id"]), step))
    given["log_ratio"] = np.asarray(columns["old_logprob"], np.float32) - np.asarray(
        columns["rollout_logprob"], np.float32
    )
    # Half a character is a legal token of byte-level tokenizers and no legal text.
    given["token"] = [str(t).encode("utf-8", "backslashreplace").decode() for t in columns["token"]]
    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in SCHEMA.items()])
    arrays = [pyarrow.array(_typed(given[name], kind), schema.field(name).type) for name, kind in SCHEMA.items()]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pyarrow.parquet.write_table(pyarrow.table(arrays, schema=schema), temporary, compression="zstd")
    os.replace(temporary, path)
    return path


def _typed(column: Column, kind: str) -> Column:
    return column if kind == "string" else np.asarray(column, dtype=kind)


def sampled_tokens(columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    """The columns of the tokens under the loss mask, log_ratio among them."""
    mask = np.asarray(columns["loss_mask"], bool)
    sampled = {
        name: np.asarray(column, SCHEMA[name] if SCHEMA[name] != "string" else object)[mask]
        for name, column in columns.items()
    }
    return sampled | {"log_ratio": sampled["old_logprob"] - sampled["rollout_logprob"]}


def worst_tokens(
    step: int, sampled: Mapping[str, np.ndarray], *, count: int = 20
) -> list[dict[str, str | int | float]]:
    """The tokens with the largest |log_ratio|, those without a finite one first, as rows of a table."""
    size = np.abs(sampled["log_ratio"])
    worst = np.argsort(-np.where(np.isfinite(size), size, np.inf), kind="stable")[:count]
    return [
        {"step": step} | {name: sampled[name][i].item() if name != "token" else str(sampled[name][i]) for name in SHOWN}
        for i in worst
    ]


def read_tokens(path: Path, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """The rows of one token file, optionally only some columns. Raises ValueError when the file is damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path, columns=columns)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is no readable token file: {error}") from None


LOOP = "loop.json"  # in the directory of a loop of one's own: there is no run.json then


def write_loop(directory: Path, sides: Mapping[str, str]) -> None:
    """Say that these are files of a loop that is not ours, and what both sides computed in: head_dtype, dtype."""
    write_json(directory / LOOP, {"rlalign": rlalign.__version__, **sides})


def read_loop(directory: Path) -> dict[str, str] | None:
    """What `write_loop` wrote; None where nothing is of a foreign loop, {} where it wrote tokens alone."""
    if (directory / LOOP).is_file():
        return read_json(directory / LOOP)
    return {} if not (directory / RUN).exists() and any((directory / TOKENS).glob("step-*.parquet")) else None


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
    if batch.routes is not None:
        tensors |= {"routes_experts_ELK": batch.routes.experts_ELK, "routes_count_B": batch.routes.count_B}
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
    kept, routes = (
        {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        for prefix in ("kept_", "routes_")
    )
    return SavedStep(
        step=about["step"],
        version=about["version"],
        trainer_ranks=about["trainer_ranks"],
        model=folder / MODEL,
        batch=RolloutBatch(
            **tensors,
            spec=LogprobSpec(**about["spec"]),
            kept=KeptSets(**kept) if kept else None,
            routes=Routes(**routes) if routes else None,
        ),
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
