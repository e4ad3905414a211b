"""Activations on disk: one file per point and rank, appended while a model runs, read back one point at a time.

A recording of a long batch is larger than memory, so nothing here holds more than one activation of one forward.
Suffixes: N rows (a row is one token in one forward), D features, B sequences, L padded length.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TOKENS, LOGITS = (
    "tokens",
    "logits",
)  # tables of rows: every token of every forward, and those that were projected to logits
SEQUENCE, POSITION, DECODED = 0, 1, 2  # columns of a table
UNKNOWN = -1  # sequence of a row that belongs to nobody's request


@dataclass(frozen=True, slots=True)
class Tap:
    """Where one point of a model is read: a module's input or output.

    index: which tensor of a tuple; part: which piece of a fused projection (0 q, 1 k, 2 v; 0 gate, 1 up), or None.
    """

    point: str
    module: str
    side: str  # "input", "output", or "attention": an argument of transformers' attention function
    index: int = 0
    part: int | None = None


class Recorder:
    """Appends rows to a folder. One per rank and recording."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._tables: dict[str, list[Tensor]] = {TOKENS: [], LOGITS: []}
        self._points: dict[str, dict[str, object]] = {}

    def rows(self, table: str, rows_N3: Tensor) -> None:
        """Announce the rows (sequence, position, decoded) that the next writes to points of this table are about."""
        self._tables[table].append(rows_N3.to(torch.int64).cpu())

    def write(self, point: str, values_ND: Tensor, *, table: str = TOKENS) -> None:
        """Append the rows of one point, in their own dtype. Raises RuntimeError when width or dtype change."""
        data_ND = values_ND.detach().to("cpu").contiguous()
        about = {"table": table, "width": data_ND.shape[1], "dtype": str(data_ND.dtype).removeprefix("torch.")}
        known = self._points.setdefault(point, about | {"rows": 0})
        if any(known[key] != value for key, value in about.items()):
            raise RuntimeError(f"point {point!r} changed while it was recorded: it was {known}, now {about}")
        known["rows"] += data_ND.shape[0]
        with (self.directory / f"{point}.bin").open("ab") as file:
            file.write(memoryview(data_ND.view(torch.uint8).numpy()).cast("B") if data_ND.numel() else b"")

    def close(self) -> dict[str, int]:
        """Write the tables; returns {point: rows}. Raises RuntimeError for a point that did not run once per forward."""
        tables = {n: torch.cat(t) if t else torch.zeros(0, 3, dtype=torch.int64) for n, t in self._tables.items()}
        counts = {point: about["rows"] for point, about in self._points.items()}
        for point, about in self._points.items():
            if about["rows"] != len(tables[about["table"]]):
                raise RuntimeError(
                    f"point {point!r} was recorded for {about['rows']} rows of {len(tables[about['table']])}: its module does not "
                    "run exactly once per forward; map the point to another module"
                )
        save_file(tables, self.directory / "rows.safetensors")
        (self.directory / "points.json").write_text(json.dumps(self._points))
        return counts


class Recording:
    """A finished recording: one folder per rank under `directory`.

    Each token counts once: of a token that ran twice (a chunk boundary, a preempted request) the first run counts.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ranks = sorted(directory.glob("rank*"), key=lambda p: int(p.name.removeprefix("rank")))
        if not self._ranks:
            raise RuntimeError(f"{directory} holds no recording: no rank wrote one")
        self._about = [json.loads((rank / "points.json").read_text()) for rank in self._ranks]
        tables = load_file(self._ranks[0] / "rows.safetensors")
        self._order = {name: _first_of_each(table) for name, table in tables.items()}
        self._tables = {name: tables[name][order] for name, order in self._order.items()}

    def __contains__(self, point: str) -> bool:
        return point in self._about[0]

    @property
    def points(self) -> list[str]:
        return list(self._about[0])

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return sum(file.stat().st_size for rank in self._ranks for file in rank.iterdir())

    def table(self, point: str) -> Tensor:
        """[N, 3] (sequence, position, decoded) of the point's rows, in the order in which `read` counts them."""
        return self._tables[self._about[0][point]["table"]]

    def read(self, point: str, rows: Sequence[int] | Tensor, *, width: int) -> Tensor:
        """[len(rows), width]: the chosen rows of a point, its ranks' pieces put together.

        width: features of the whole point. Raises RuntimeError when the ranks' pieces do not add up to it.
        """
        pieces = [self._piece(rank, point, rows) for rank in range(len(self._ranks)) if point in self._about[rank]]
        return join(pieces, width, point)

    @property
    def ranks(self) -> int:
        return len(self._ranks)

    def width(self, point: str, rank: int = 0) -> int:
        return int(self._about[rank][point]["width"])

    def dense(self, point: str, sequences: Sequence[int], length: int, *, width: int) -> tuple[Tensor, Tensor]:
        """Values [B, L, width] and where they are known [B, L] bool, for these sequences."""
        table_N3 = self.table(point)
        values = known = None
        for i, sequence in enumerate(sequences):
            rows_N = (table_N3[:, SEQUENCE] == sequence).nonzero()[:, 0]
            data_ND, at_N = self.read(point, rows_N, width=width), table_N3[rows_N, POSITION]
            if values is None:
                values = data_ND.new_zeros(len(sequences), length, width)
                known = torch.zeros(len(sequences), length, dtype=torch.bool)
            inside = at_N < length
            values[i, at_N[inside]], known[i, at_N[inside]] = data_ND[inside], True
        return values, known

    def delete(self) -> None:
        """Free the disk."""
        shutil.rmtree(self.directory)

    def _piece(self, rank: int, point: str, rows: Sequence[int] | Tensor) -> Tensor:
        about = self._about[rank][point]
        count, width, dtype = about["rows"], about["width"], getattr(torch, about["dtype"])
        if not count:
            return torch.zeros(0, width, dtype=dtype)
        path = self._ranks[rank] / f"{point}.bin"
        mapped_ND = torch.from_file(str(path), shared=False, size=count * width, dtype=dtype).view(count, width)
        return mapped_ND[self._order[about["table"]][torch.as_tensor(rows, dtype=torch.int64)]]


def join(pieces: Sequence[Tensor], width: int, point: str) -> Tensor:
    """Rows [N, width] from the pieces of tensor-parallel ranks: whole on each, cut into slices, or slices held several times.

    vLLM keeps one key/value head on several ranks when there are fewer heads than ranks: then every n-th piece counts.
    """
    own, ranks = pieces[0].shape[1], len(pieces)
    if own == width:
        return pieces[0]
    slices, left_over = divmod(width, own)
    if left_over or slices > ranks or ranks % slices:
        raise RuntimeError(
            f"point {point!r} has {width} features in the trainer and {own} on each of {ranks} rollout ranks: these are not the "
            "same activation; the two sides run different architectures, or the mapping pairs different modules"
        )
    return torch.cat([pieces[i] for i in range(0, ranks, ranks // slices)], dim=1)


def _first_of_each(table_N3: Tensor) -> Tensor:
    """Indices of the first row of every (sequence, position), sorted by both; rows of nobody are left out."""
    seen: dict[tuple[int, int], int] = {}
    for i, (sequence, position, _) in enumerate(table_N3.tolist()):
        if sequence != UNKNOWN:
            seen.setdefault((sequence, position), i)
    return torch.tensor([seen[key] for key in sorted(seen)], dtype=torch.int64)
