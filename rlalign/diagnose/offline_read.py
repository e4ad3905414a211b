"""Turn the token dumps of finished runs, ours and others', into flat arrays.

Two layouts: one row per token with a sequence column (rlalign's parquet), or one row per sequence with lists
(prime-rl's token export, NeMo-RL's and slime's training data, batches dumped by verl or TRL users).

N tokens, over all sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from rlalign.diagnose.offline_files import Source, files_of, open_dump, step_in

if TYPE_CHECKING:
    from numpy.typing import NDArray

pc: Any = pyarrow.compute  # makes its functions when it is imported

FIELDS: dict[str, tuple[str, ...]] = {
    "old_logprobs": (
        "old_logprob", "old_logprobs", "old_log_probs", "old_per_token_logps", "trainer_logprobs", "prev_logprobs",
    ),
    "rollout_logprobs": (
        "rollout_logprob", "rollout_logprobs", "rollout_log_probs", "sampling_per_token_logps", "inference_logprobs",
        "generation_logprobs",
    ),
    "loss_mask": ("loss_mask", "response_mask", "completion_mask", "token_loss_mask"),
    "tool_mask": ("tool_mask",),
    "rl_weights": ("rl_weights",),
    "sample_mask": ("sample_loss_mask",),
    "token_ids": ("token_id", "token_ids", "responses", "completion_ids", "response_ids"),
    "token": ("token",),
    "sequence": ("sequence",),
    "step": ("step", "global_step", "global_steps"),
    "group": ("group_id", "prompt_id", "uid", "env_name"),
    "lag": ("lag", "staleness"),
    "version": ("policy_version",),
    "entropy": ("entropy", "entropies"),
}  # fmt: skip
"""Our name for a column -> the names it has in rlalign, verl, TRL, prime-rl, NeMo-RL and slime, tried in order."""

MASKS = ("loss_mask", "tool_mask", "rl_weights", "sample_mask")
"""What decides whether a token counts, all that are there: TRL multiplies its completion mask by the tool mask (tokens of tools
carry a sampling logprob of 0.0), prime-rl's mismatch leaves tokens of weight 0 out, NeMo-RL's loss samples of mask 0."""

TEXT_DUMPS = (
    "Text dumps (verl's rollout_data_dir, TRL's log_completions) hold no log-probabilities; docs/metrics.md has the lines that "
    "write a dump from a verl or TRL trainer"
)


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
    masked_by: str = "nothing"

    def __len__(self) -> int:
        return len(self.sequence_N)


def read_tokens(path: Path, columns: Mapping[str, str] | None = None, *, all_tokens: bool = False) -> Tokens:
    """Read a dump: a file, a directory or a glob. columns: our field name -> the dump's, where the known names do not fit.

    all_tokens: every token counts, where the dump has no mask. A null logprob (prime-rl writes NaN and infinities so) becomes
    NaN and is counted as non-finite later. A loss_mask named in `columns` is the whole rule; otherwise all of `MASKS` count.
    Raises ValueError, naming file and column, on an unknown extension, missing logprobs or masks, rows of unequal lengths.
    """
    wanted = dict(columns or {})
    unknown = sorted(set(wanted) - set(FIELDS))
    if unknown:
        raise ValueError(f"--column: unknown field {unknown}; choose from {', '.join(FIELDS)}")
    files = files_of(Path(path))
    sources = [open_dump(file) for file in files]
    names = list(dict.fromkeys(name for source in sources for name in source.names))
    found = _match(Path(path), names, wanted, all_tokens=all_tokens)
    fields = {*found, "sequence"} | ({"step"} if any(step_in(file.name) is not None for file in files) else set())
    pieces: dict[str, list[np.ndarray]] = {field: [] for field in fields}
    vocabularies: dict[str, dict[str, int]] = {"token": {}, "group": {}}
    for file, source in zip(files, sources, strict=True):
        _read_file(file, source, found, pieces, vocabularies)
    if not sum(len(piece) for piece in pieces["old_logprobs"]):
        raise ValueError(f"{path} holds no tokens")
    flat = {field: np.concatenate(pieces.pop(field)) for field in list(pieces)}
    return _tokens(flat, vocabularies, [found[field] for field in MASKS if field in found])


def _read_file(
    file: Path,
    source: Source,
    found: Mapping[str, str],
    pieces: dict[str, list[np.ndarray]],
    vocabularies: dict[str, dict[str, int]],
) -> None:
    """Append a file's tokens to the pieces of every field."""
    absent = [name for field, name in found.items() if name not in source.names and field in REQUIRED]
    if absent:
        raise ValueError(f"{file} has no column {absent}, which other files of the dump have")
    own = {field: name for field, name in found.items() if name in source.names}
    first = _ends_at(pieces["sequence"])
    for block in source.blocks(list(dict.fromkeys(own.values()))):
        columns = _flatten(file, block, own, _ends_at(pieces["sequence"]), first)
        count = len(columns["old_logprobs"])
        if "step" in pieces and "step" not in columns:
            columns["step"] = pa.array([step_in(file.name)] * count, pa.int64())
        for field in pieces:
            column = columns[field] if field in columns else pa.nulls(count)
            try:
                pieces[field].append(_numbers(field, column, vocabularies))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise ValueError(
                    f"{file}: the column {found[field]} holds {column.type}, not the {field}: {error}"
                ) from error


REQUIRED = ("old_logprobs", "rollout_logprobs", *MASKS)


def _ends_at(sequence_pieces: list[np.ndarray]) -> int:
    """The next free sequence number."""
    return int(sequence_pieces[-1][-1]) + 1 if sequence_pieces and len(sequence_pieces[-1]) else 0


def _match(path: Path, names: list[str], wanted: dict[str, str], *, all_tokens: bool) -> dict[str, str]:
    """Field -> the dump's column, for every field the dump has."""
    absent = sorted(set(wanted.values()) - set(names))
    if absent:
        raise ValueError(f"{path} has no column {absent}; it has {', '.join(names)}")
    found = {f: next((n for n in aliases if n in names), None) for f, aliases in FIELDS.items()} | wanted
    if "loss_mask" in wanted or all_tokens:
        found |= {field: None for field in MASKS if field not in wanted}
    for field in ("old_logprobs", "rollout_logprobs"):
        if found[field] is None:
            raise ValueError(
                f"{path} has no {field}: looked for {', '.join(FIELDS[field])}, it has {', '.join(names)}. "
                f"Name the column with --column {field}=NAME. {TEXT_DUMPS}."
            )
    if not all_tokens and not any(found[field] for field in MASKS):
        raise ValueError(
            f"{path} has no loss mask: looked for {', '.join(FIELDS['loss_mask'])}, it has {', '.join(names)}. Prompt, padding and "
            "tool output would count as sampled tokens. Name the column with --column loss_mask=NAME, or say --all-tokens if "
            "every token of the dump was sampled"
        )
    return {field: name for field, name in found.items() if name is not None}


def _flatten(
    path: Path, block: pa.Table | pa.RecordBatch, found: Mapping[str, str], next_sequence: int, file_starts: int
) -> dict[str, pa.Array]:
    """Columns of one block as one value per token; sequences are numbered where rows are sequences.

    next_sequence: the first free number; file_starts: what this file's own numbers, where rows are tokens, are counted from.
    """
    raw = {field: _column(path, block, name) for field, name in found.items()}
    if not _is_list(raw["old_logprobs"]):
        if "sequence" not in raw:
            raise ValueError(f"{path}: one row per token needs a sequence column; name it with --column sequence=NAME")
        raw["sequence"] = pc.add(raw["sequence"].cast(pa.int64()), file_starts)
        return raw
    count_B = pc.list_value_length(raw["old_logprobs"])
    parents = pc.list_parent_indices(raw["old_logprobs"])
    flat = {}
    for field, column in raw.items():
        if field in MASKS and column.null_count:
            raise ValueError(
                f"{path}: {column.null_count} sequences have no {found[field]}, and nothing says whether their tokens count"
            )
        if _is_list(column) and column.null_count:  # of a column that only some rows have
            rows = zip(column.to_pylist(), count_B.to_pylist(), strict=True)
            column = pa.array([[None] * count if row is None else row for row, count in rows], column.type)
        if not _is_list(column):
            flat[field] = column.take(parents)
        elif field == "sample_mask":
            flat[field] = column.flatten().take(parents)
        elif pc.list_value_length(column).equals(count_B):
            flat[field] = column.flatten()
        else:
            raise ValueError(f"{path}: {found[field]} and {found['old_logprobs']} differ in length in some sequence")
    flat["sequence"] = pc.add(parents.cast(pa.int64()), next_sequence)
    return flat


def _column(path: Path, block: pa.Table | pa.RecordBatch, name: str) -> pa.Array:
    """One array; lists of one list (NeMo-RL) are that list. Raises ValueError for other nested lists."""
    column = block.column(name)
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    while _is_list(column) and pa.types.is_nested(column.type.value_type):
        if pc.any(pc.not_equal(pc.list_value_length(column), 1)).as_py():
            raise ValueError(f"{path}: {name} holds lists of lists; expected one list for each sequence")
        column = column.flatten()
    return column


def _is_list(column: pa.Array) -> bool:
    return pa.types.is_list(column.type) or pa.types.is_large_list(column.type)


def _numbers(field: str, column: pa.Array, vocabularies: dict[str, dict[str, int]]) -> np.ndarray:
    """The column as float32, bool or int32; strings as indices into the field's vocabulary; null as NaN or -1."""
    if field in vocabularies:
        encoded = pc.fill_null(column.cast(pa.string()), "").dictionary_encode()
        seen = vocabularies[field]
        codes = np.array([seen.setdefault(text, len(seen)) for text in encoded.dictionary.to_pylist()], np.int32)
        return codes[encoded.indices.to_numpy()] if len(codes) else codes
    if field in MASKS:
        if column.null_count:
            raise pa.ArrowInvalid(
                f"{column.null_count} of its tokens have no mask, and nothing says whether they count"
            )
        return column.cast(pa.float32()).to_numpy(zero_copy_only=False) != 0
    if field in ("old_logprobs", "rollout_logprobs", "entropy"):
        return pc.fill_null(column.cast(pa.float32()), np.nan).to_numpy(zero_copy_only=False).copy()
    return pc.fill_null(column.cast(pa.int64()), -1).to_numpy(zero_copy_only=False).astype(np.int32)


def _tokens(
    flat: dict[str, np.ndarray], vocabularies: dict[str, dict[str, int]], mask_columns: Sequence[str]
) -> Tokens:
    mask_N = np.ones(len(flat["sequence"]), bool)
    for field in MASKS:
        mask_N &= flat.get(field, True)
    step_N = flat.get("step")
    changed_N = np.diff(flat["sequence"], prepend=flat["sequence"][:1]) != 0
    if step_N is not None:  # the same sequence number may come again in a later step
        changed_N |= np.diff(step_N, prepend=step_N[:1]) != 0
    return Tokens(
        sequence_N=np.cumsum(changed_N, dtype=np.int32),
        old_N=flat["old_logprobs"],
        rollout_N=flat["rollout_logprobs"],
        mask_N=mask_N,
        masked_by=" * ".join(mask_columns) or "nothing: every token counts",
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
