"""Products whose bits do not depend on the batch, made of torch's own: blocks of a fixed shape, padded with zeros.

What a host without the compiled head kernel takes. A library may order the additions of an element by the shape of the product
and by the element's place in it; blocks of one shape leave only the place, and `shape_for` looks at every place before it trusts
a shape. Suffixes: N rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

COLUMNS = (512, 32)
ROWS = (512, 64, 16)  # a call takes the lowest that holds its rows, of those that agree bit for bit


@dataclass(frozen=True, slots=True)
class Shape:
    """Of one block: `columns` of the vocabulary, any of these numbers of rows (ascending)."""

    columns: int
    rows: tuple[int, ...]


def product(hidden_ND: Tensor, weight_VD: Tensor, out_NV: Tensor) -> Tensor:
    """hidden @ weight.T into `out` (float32). Operands float32 or bf16, on CPU. Raises RuntimeError where no shape is sound."""
    (n, d), vocab = hidden_ND.shape, weight_VD.shape[0]
    shape = shape_for(d, torch.get_num_threads())
    if shape is None:
        raise RuntimeError(f"no shape of blocks gives the same bits at every place on this host (hidden size {d})")
    height = next((rows for rows in shape.rows if rows >= n), shape.rows[-1])
    rows = [(start, _filled(hidden_ND[start : start + height], height)) for start in range(0, n, height)]
    block = torch.empty(height, shape.columns)
    for start in range(0, vocab, shape.columns):
        weight = _filled(weight_VD[start : start + shape.columns], shape.columns)
        for first, hidden in rows:
            target = out_NV[first : first + height, start : start + shape.columns]
            _mm(hidden, weight, block)
            target.copy_(block[: target.shape[0], : target.shape[1]])
    return out_NV


@lru_cache(maxsize=64)
def shape_for(hidden_size: int, threads: int) -> Shape | None:
    """The largest blocks whose elements come out the same at every place, here and with so many threads; None: there are none."""
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, hidden_size, generator=generator).bfloat16().float() for _ in range(3)]
    for columns in COLUMNS:
        found = {rows: _the_same_everywhere(pairs, rows, columns) for rows in ROWS}
        values = [value for value in found.values() if value is not None]
        if values:
            return Shape(columns, tuple(sorted(rows for rows, value in found.items() if value == values[0])))
    return None


def _the_same_everywhere(pairs: list[Tensor], rows: int, columns: int) -> tuple[float, ...] | None:
    """h.w of every pair from a block filled with h and w; None when two places differ."""
    values = []
    for hidden_D, weight_D in pairs:
        block = _mm(hidden_D.repeat(rows, 1), weight_D.repeat(columns, 1), torch.empty(rows, columns))
        if not bool((block == block[0, 0]).all()):
            return None
        values.append(block[0, 0].item())
    return tuple(values)


def _mm(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False):
            return torch.mm(hidden, weight.t(), out=out)
    finally:
        switch.fp32_precision = before


def _filled(part: Tensor, height: int) -> Tensor:
    """A new float32 tensor of `height` rows that begins with `part`."""
    whole = torch.zeros(height, part.shape[1])
    whole[: len(part)] = part
    return whole
