"""Token dumps of finished runs, ours and others', as flat arrays.

Two layouts: one row per token with a sequence column (rlalign's parquet), or one row per sequence with lists
(prime-rl's token export, batches dumped by verl or TRL users). JSONL or parquet.

N tokens, over all sequences.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from numpy.typing import NDArray

FIELDS: dict[str, tuple[str, ...]] = {
    "old_logprobs": ("old_logprob", "old_logprobs", "old_log_probs", "old_per_token_logps", "trainer_logprobs"),
    "rollout_logprobs": (
        "rollout_logprob", "rollout_logprobs", "rollout_log_probs", "sampling_per_token_logps", "inference_logprobs",
    ),
    "loss_mask": ("loss_mask", "response_mask", "completion_mask"),
    "token_ids": ("token_id", "token_ids", "responses", "completion_ids", "response_ids"),
    "token": ("token",),
    "sequence": ("sequence",),
    "step": ("step", "global_step", "global_steps"),
    "group": ("group_id", "prompt_id", "uid", "env_name"),
    "lag": ("lag", "staleness"),
    "version": ("policy_version",),
    "entropy": ("entropy", "entropies"),
}  # fmt: skip
"""Our name for a column -> the names it has in rlalign, verl, TRL and prime-rl, tried in order."""

BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """All tokens of a dump in file order; sequences are runs of equal `sequence_N`. Absent columns are None.

    token_N: strings as indices into `vocabulary`. group_N: index into `groups`.
    """

    sequence_N: NDArray[np.int32]
    old_N: NDArray[np.float32]
    rollout_N: NDArray[np.float32]
    mask_N: NDArray[np.bool_]
    step_N: NDArray[np.int32] | None = None
    token_id_N: NDArray[np.int32] | None = None
    token_N: NDArray[np.int32] | None = None
    vocabulary: tuple[str, ...] = ()
    group_N: NDArray[np.int32] | None = None
    groups: tuple[str, ...] = ()
    lag_N: NDArray[np.int32] | None = None
    version_N: NDArray[np.int32] | None = None
    entropy_N: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.sequence_N)


def read_tokens(path: Path, columns: Mapping[str, str] | None = None) -> Tokens:
    """Read a JSONL or parquet dump. columns: our field name -> the dump's, where the known names do not fit.

    A null logprob (prime-rl writes NaN and infinities so) becomes NaN and is counted as non-finite later.
    Raises ValueError on an unknown extension, missing logprobs, rows of unequal lengths, or an unknown field name.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    wanted = dict(columns or {})
    unknown = sorted(set(wanted) - set(FIELDS))
    if unknown:
        raise ValueError(f"--column: unknown field {unknown}; choose from {', '.join(FIELDS)}")
    if path.suffix == ".parquet":
        names, blocks = pq.read_schema(path).names, _parquet_blocks
    elif path.suffix in (".jsonl", ".json"):
        names, blocks = _first_row_names(path), _json_blocks
    else:
        raise ValueError(f"{path}: read .parquet or .jsonl, got {path.suffix or 'no extension'!r}")
    found = _match(path, names, wanted)
    pieces: dict[str, list[np.ndarray]] = {field: [] for field in (*found, "sequence")}
    vocabularies: dict[str, dict[str, int]] = {"token": {}, "group": {}}
    for block in blocks(path, list(found.values())):
        for field, column in _flatten(path, block, found, _ends_at(pieces["sequence"])).items():
            pieces[field].append(_numbers(field, column, vocabularies))
    if not sum(len(piece) for piece in pieces["old_logprobs"]):
        raise ValueError(f"{path} holds no tokens")
    return _tokens({field: np.concatenate(pieces.pop(field)) for field in list(pieces)}, vocabularies)


def _ends_at(sequence_pieces: list[np.ndarray]) -> int:
    """The next free sequence number."""
    return int(sequence_pieces[-1][-1]) + 1 if sequence_pieces and len(sequence_pieces[-1]) else 0


def _match(path: Path, names: list[str], wanted: dict[str, str]) -> dict[str, str]:
    """Field -> the dump's column, for every field the dump has."""
    absent = sorted(set(wanted.values()) - set(names))
    if absent:
        raise ValueError(f"{path} has no column {absent}; it has {', '.join(names)}")
    found = {f: next((n for n in aliases if n in names), None) for f, aliases in FIELDS.items()} | wanted
    for field in ("old_logprobs", "rollout_logprobs"):
        if found[field] is None:
            raise ValueError(
                f"{path} has no {field}: looked for {', '.join(FIELDS[field])}, it has {', '.join(names)}. "
                f"Name the column with --column {field}=NAME. Text dumps (verl's rollout_data_dir, TRL's "
                "log_completions) hold no log-probabilities: dump the batch's old and rollout log-probabilities "
                "with its response mask instead."
            )
    return {field: name for field, name in found.items() if name is not None}


def _first_row_names(path: Path) -> list[str]:
    with path.open("rb") as file:
        line = file.readline()
    try:
        row = json.loads(line or b"{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line 1 is not JSON: {error}") from error
    if not isinstance(row, dict) or not row:
        raise ValueError(f"{path}: the first line must be a JSON object with the token columns")
    return list(row)


def _parquet_blocks(path: Path, names: list[str]) -> Iterator[pa.RecordBatch]:
    yield from pq.ParquetFile(path).iter_batches(columns=names, batch_size=1 << 16)


def _json_blocks(path: Path, names: list[str]) -> Iterator[pa.Table]:
    with path.open("rb") as file:
        first = json.loads(file.readline())
        file.seek(0)
        schema = pa.schema([(name, _json_type(first.get(name))) for name in names])
        while lines := file.readlines(BLOCK_BYTES):
            text = b"".join(lines)
            read = pj.ReadOptions(use_threads=False, block_size=len(text) + 1)
            parse = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
            try:
                yield pj.read_json(io.BytesIO(text), read_options=read, parse_options=parse)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{path}: {error}") from error


def _json_type(value: object) -> pa.DataType:
    """The column type a first value implies; integers may turn out to be 0/1 masks, floats may be null."""
    if isinstance(value, list):
        some = next((x for x in value if x is not None), 0.0)
        return pa.list_(_json_type(some))
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, str):
        return pa.string()
    return pa.float64()


def _flatten(
    path: Path, block: pa.Table | pa.RecordBatch, found: dict[str, str], next_sequence: int
) -> dict[str, pa.Array]:
    """Columns of one block as one value per token; sequences are numbered where rows are sequences."""
    raw = {field: block.column(name) for field, name in found.items()}
    raw = {f: c.combine_chunks() if isinstance(c, pa.ChunkedArray) else c for f, c in raw.items()}
    if not _is_list(raw["old_logprobs"]):
        if "sequence" not in raw:
            raise ValueError(f"{path}: one row per token needs a sequence column; name it with --column sequence=NAME")
        return raw
    count_B = pc.list_value_length(raw["old_logprobs"])
    parents = pc.list_parent_indices(raw["old_logprobs"])
    flat = {}
    for field, column in raw.items():
        if not _is_list(column):
            flat[field] = column.take(parents)
        elif pc.list_value_length(column).equals(count_B):
            flat[field] = column.flatten()
        else:
            raise ValueError(f"{path}: {found[field]} and {found['old_logprobs']} differ in length in some sequence")
    flat["sequence"] = pc.add(parents.cast(pa.int64()), next_sequence)
    return flat


def _is_list(column: pa.Array) -> bool:
    return pa.types.is_list(column.type) or pa.types.is_large_list(column.type)


def _numbers(field: str, column: pa.Array, vocabularies: dict[str, dict[str, int]]) -> np.ndarray:
    """The column as float32, bool or int32; strings as indices into the field's vocabulary; null as NaN or -1."""
    if field in vocabularies:
        encoded = pc.fill_null(column.cast(pa.string()), "").dictionary_encode()
        seen = vocabularies[field]
        codes = np.array([seen.setdefault(text, len(seen)) for text in encoded.dictionary.to_pylist()], np.int32)
        return codes[encoded.indices.to_numpy()] if len(codes) else codes
    if field == "loss_mask":
        return pc.fill_null(column.cast(pa.float32()), 0.0).to_numpy(zero_copy_only=False) > 0
    if field in ("old_logprobs", "rollout_logprobs", "entropy"):
        return pc.fill_null(column.cast(pa.float32()), np.nan).to_numpy(zero_copy_only=False).copy()
    return pc.fill_null(column.cast(pa.int64()), -1).to_numpy(zero_copy_only=False).astype(np.int32)


def _tokens(flat: dict[str, np.ndarray], vocabularies: dict[str, dict[str, int]]) -> Tokens:
    step_N = flat.get("step")
    changed_N = np.diff(flat["sequence"], prepend=flat["sequence"][:1]) != 0
    if step_N is not None:  # the same sequence number may come again in a later step
        changed_N |= np.diff(step_N, prepend=step_N[:1]) != 0
    return Tokens(
        sequence_N=np.cumsum(changed_N, dtype=np.int32),
        old_N=flat["old_logprobs"],
        rollout_N=flat["rollout_logprobs"],
        mask_N=flat.get("loss_mask", np.ones(len(changed_N), bool)),
        step_N=step_N,
        token_id_N=flat.get("token_ids"),
        token_N=flat.get("token"),
        vocabulary=tuple(vocabularies["token"]),
        group_N=flat.get("group"),
        groups=tuple(vocabularies["group"]),
        lag_N=flat.get("lag"),
        version_N=flat.get("version"),
        entropy_N=flat.get("entropy"),
    )
