"""Per-token files: one parquet per sampled step, one row per token, the rows behind every mismatch number."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow

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
