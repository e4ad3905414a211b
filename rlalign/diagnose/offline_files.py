"""Open the files of a token dump, whatever wrote them, and hand out their rows in blocks of Arrow columns.

A dump is a file, a directory or a glob: one file per step and rank is what most stacks write. Formats: parquet; JSON lines and
JSON arrays, plain, .gz or .zst; slime's `--save-debug-train-data` (.pt).
"""

from __future__ import annotations

import glob
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.json as pj
import pyarrow.parquet as pq

BLOCK_BYTES = 4 << 20
FORMATS = (".parquet", ".jsonl", ".json", ".pt")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SLIME = {  # its name for a list over sequences -> the one that the reader knows
    "log_probs": "old_log_probs", "rollout_log_probs": "rollout_log_probs", "loss_masks": "loss_mask", "tokens": "token_ids",
}  # fmt: skip

EMPTY, NUMBERS = pa.list_(pa.null()), pa.list_(pa.float64())
UNDECIDED = (None, pa.null(), EMPTY)  # a later row may say more

_keys = msgspec.json.Decoder(dict[str, msgspec.Raw])
_rows = msgspec.json.Decoder(list[msgspec.Raw])


def files_of(path: Path) -> list[Path]:
    """The files of a dump in the order of the numbers in their names. Raises ValueError when there are none to read."""
    if path.is_dir():
        found = [file for file in path.iterdir() if _format(file) in FORMATS]
        what = f"{path}: no file in it ends in {', '.join(FORMATS)} (or these with .gz, .zst)"
    else:
        found = [path] if path.is_file() else [Path(name) for name in glob.glob(str(path))]
        what = f"{path}: no such file, directory or pattern that matches a file"
    if not found:
        raise ValueError(what)
    for file in found:
        if _format(file) not in FORMATS:
            raise ValueError(
                f"{file}: read {', '.join(FORMATS)}, also with .gz or .zst, got {file.suffix or 'no extension'!r}"
            )
    return sorted(found, key=_numbers_in)


def step_in(name: str) -> int | None:
    """The step that a file's name states: 12 of train_data_step12.jsonl."""
    found = re.search(r"step[_-]?(\d+)", name)
    return None if found is None else int(found.group(1))


def open_dump(file: Path) -> Source:
    """The file, ready to be read. Raises ValueError when it is not what its name says."""
    kind = _format(file)
    if kind == ".parquet":
        return _Parquet(file)
    return _Json(file) if kind in (".jsonl", ".json") else _slime(file)


class Source:
    """One file. names: of its columns, of any row."""

    names: Sequence[str]

    def blocks(self, names: Sequence[str]) -> Iterator[pa.Table | pa.RecordBatch]:
        """The columns asked for, in pieces that fit in memory."""
        raise NotImplementedError


class _Parquet(Source):
    def __init__(self, file: Path) -> None:
        try:
            self._file = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file} is not a parquet file: {error}") from error
        self.names = self._file.schema_arrow.names

    def blocks(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        yield from self._file.iter_batches(columns=list(names), batch_size=1 << 16)


class _Json(Source):
    """JSON lines, or one array of objects. Every row is looked at: a column may begin in a later one, or with null."""

    def __init__(self, file: Path) -> None:
        self._path = file
        self._types: dict[str, pa.DataType] = {}  # by the first value that has one
        for number, line in enumerate(self._lines(), 1):
            for name, value in self._row(line, number).items():
                if self._types.get(name) in UNDECIDED:
                    self._types[name] = _type(msgspec.json.decode(_plain(value)))
        if not self._types:
            raise ValueError(f"{file}: the first line must be a JSON object with the token columns")
        self.names = list(self._types)

    def blocks(self, names: Sequence[str]) -> Iterator[pa.Table]:
        schema = pa.schema([(name, NUMBERS if self._types[name] == EMPTY else self._types[name]) for name in names])
        start = 1
        for lines in _pieces(self._lines()):
            text = b"\n".join(map(_plain, lines))
            read = pj.ReadOptions(use_threads=False, block_size=len(text) + 1)
            parse = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
            try:
                yield pj.read_json(io.BytesIO(text), read_options=read, parse_options=parse)
            except pa.ArrowInvalid as error:
                raise ValueError(self._what_is_wrong(lines, start, schema)) from error
            start += len(lines)

    def _lines(self) -> Iterator[bytes]:
        """Its objects, one at a time; blank lines are left out."""
        with pa.OSFile(str(self._path)) as plain:
            packed = COMPRESSIONS.get(self._path.suffix)
            file = io.BufferedReader(plain if packed is None else pa.CompressedInputStream(plain, packed))
            try:
                first = next((line for line in file if line.strip()), b"")
                if first.lstrip().startswith(b"["):
                    yield from map(bytes, _rows.decode(_plain(first + file.read())))
                    return
                yield first
                yield from (line for line in file if line.strip())
            except (OSError, msgspec.DecodeError) as error:
                raise ValueError(f"{self._path} cannot be read: {error}") from error

    def _row(self, line: bytes, number: int) -> dict[str, msgspec.Raw]:
        if not line.strip():
            return {}
        try:
            return _keys.decode(_plain(line))
        except msgspec.DecodeError as error:
            raise ValueError(f"{self._path}, line {number} is not a JSON object: {error}") from error

    def _what_is_wrong(self, lines: Sequence[bytes], start: int, schema: pa.Schema) -> str:
        for number, line in enumerate(lines, start):
            row = msgspec.json.decode(_plain(line))
            for field in schema:
                try:
                    pa.array([row.get(field.name)], field.type)
                except (pa.ArrowInvalid, pa.ArrowTypeError):
                    shown = repr(row[field.name])[:60]
                    return f"{self._path}, line {number}: {field.name} was {field.type} before and is {shown} here"
        return f"{self._path}, lines {start} to {start + len(lines) - 1}: these rows do not fit into the columns {schema.names}"


class _Table(Source):
    def __init__(self, table: pa.Table) -> None:
        self._table, self.names = table, table.column_names

    def blocks(self, names: Sequence[str]) -> Iterator[pa.Table]:
        yield self._table.select(list(names))


def _slime(file: Path) -> Source:
    """{"rollout_id", "rank", "rollout_data": lists over sequences}; logprobs and masks are of the response's tokens alone."""
    import torch

    try:
        found = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # pickles fail in many ways
        raise ValueError(f"{file} cannot be read without running code from it: {error}") from error
    data = found.get("rollout_data") if isinstance(found, dict) else None
    if not isinstance(data, dict) or "log_probs" not in data:
        raise ValueError(
            f"{file} is not slime's training data: expected rollout_data with log_probs, "
            f"got {sorted(data if isinstance(data, dict) else found) if isinstance(found, dict) else type(found).__name__}. "
            "Write it with --save-debug-train-data (rollout dumps hold no log_probs)"
        )
    columns: dict[str, list[Any]] = {
        ours: [torch.as_tensor(x).tolist() for x in data[name]] for name, ours in SLIME.items() if name in data
    }
    if "token_ids" in columns:
        pairs = zip(columns["token_ids"], columns["old_log_probs"], strict=True)
        columns["token_ids"] = [ids[len(ids) - len(own) :] for ids, own in pairs]
    columns["step"] = [int(found["rollout_id"])] * len(columns["old_log_probs"])
    return _Table(pa.table(columns))


def _format(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix in COMPRESSIONS else file.suffix


def _numbers_in(file: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name)]


def _pieces(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    piece: list[bytes] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size >= BLOCK_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _plain(line: bytes | msgspec.Raw) -> bytes:
    """Standard JSON: Python writes NaN and Infinity, which no other reader takes; they become null."""
    line = bytes(line)
    if b"NaN" not in line and b"Infinity" not in line:
        return line
    try:
        return json.dumps(json.loads(line, parse_constant=lambda _: None)).encode()
    except json.JSONDecodeError:
        return line  # the caller says which line it is


def _type(value: object) -> pa.DataType:
    """The column type that a value implies. Integers may turn out to be 0/1 masks."""
    if isinstance(value, list):
        return pa.list_(next((kind for kind in map(_type, value) if kind not in UNDECIDED), pa.null()))
    if value is None or isinstance(value, dict):
        return pa.null()
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, str):
        return pa.string()
    return pa.float64()
