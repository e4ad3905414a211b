"""rlalign mismatch FILE: the mismatch report of a run you already have, from its token dump.

B sequences, L padded length, N tokens of the whole dump.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce as fold
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from rlalign.diagnose.offline_read import Tokens, read_tokens
from rlalign.mismatch import collect, merge, summarize
from rlalign.mismatch.aligned import usable
from rlalign.mismatch.breakdown import (
    TOKEN_CLASSES,
    TokenMismatch,
    deciles,
    nonfinite_tokens,
    token_classes,
    worst_tokens,
)
from rlalign.mismatch.stats import label_table, merge_tables
from rlalign.mismatch.summary import label_means

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from rlalign.mismatch import Stats

__all__ = ["Analysis", "Labelling", "Row", "analyse"]

CHUNK_TOKENS = 1 << 16  # padded tokens measured at once: bounds the memory, not the result


@dataclass(frozen=True)
class Row:
    """A worst or broken token of the dump; sequence counts from 0 in file order."""

    step: int | None
    token: str
    at: TokenMismatch


@dataclass(frozen=True)
class Analysis:
    """Everything the report shows. tables: title -> label -> tokens, k1, k2, k3, abs_mean."""

    path: Path
    overall: dict[str, float]
    stats: Stats
    by_step: dict[int, dict[str, float]]
    tables: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    worst: list[Row] = field(default_factory=list)
    nonfinite: list[Row] = field(default_factory=list)
    masked_by: str = ""  # the columns, as the product they form
    masked_out: int = 0  # tokens


def analyse(
    path: Path, *, columns: Mapping[str, str] | None = None, worst: int = 10, all_tokens: bool = False
) -> Analysis:
    """Measure a dump: overall, per step, and by every label it has columns for."""
    tokens = read_tokens(path, columns, all_tokens=all_tokens)
    labellings = _labellings(tokens)
    sums: list[dict[int, list[float]]] = [{} for _ in labellings]
    per_step: dict[int, list[Stats]] = {}
    rows: list[Row] = []
    broken: list[Row] = []
    for index_BL, inside_BL in _chunks(tokens):
        old_BL, rollout_BL = (_pad(x, index_BL, inside_BL) for x in (tokens.old_N, tokens.rollout_N))
        mask_BL = _pad(tokens.mask_N, index_BL, inside_BL)
        lag_BL = None if tokens.lag_N is None else _pad(tokens.lag_N, index_BL, inside_BL)
        first = int(index_BL[0, 0])
        step = -1 if tokens.step_N is None else int(tokens.step_N[first])
        per_step.setdefault(step, []).append(collect(old_BL, rollout_BL, mask_BL, lag_B=lag_BL))
        given = (old_BL, rollout_BL, mask_BL)
        keep_BL = usable(old_BL, rollout_BL, mask_BL)
        place_N = index_BL[keep_BL.numpy()]
        for i, labelling in enumerate(labellings):
            label_N = torch.from_numpy(labelling.label_N[place_N])
            table = label_table(old_BL[keep_BL].double(), rollout_BL[keep_BL].double(), label_N)
            sums[i] = merge_tables(sums[i], table)
        rows += [_row(tokens, index_BL, t) for t in worst_tokens(*given, count=worst)]
        broken += [_row(tokens, index_BL, t) for t in nonfinite_tokens(*given, count=worst)]
    merged = {step: fold(merge, parts) for step, parts in sorted(per_step.items())}
    stats = fold(merge, merged.values())
    rows.sort(key=lambda r: -abs(r.at.log_ratio))
    return Analysis(
        path=Path(path),
        overall=summarize(stats),
        stats=stats,
        by_step={} if tokens.step_N is None else {step: summarize(s) for step, s in merged.items()},
        tables={each.title: each.table(total) for each, total in zip(labellings, sums, strict=True)},
        worst=rows[:worst],
        nonfinite=broken[:worst],
        masked_by=tokens.masked_by,
        masked_out=int((~tokens.mask_N).sum()),
    )


def _chunks(tokens: Tokens) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Padded index blocks of whole sequences of one step, of like lengths, CHUNK_TOKENS large or one sequence."""
    sequence_N = tokens.sequence_N
    start_B = np.flatnonzero(np.diff(sequence_N, prepend=-1))
    count_B = np.diff(start_B, append=len(sequence_N))
    step_B = np.zeros(len(start_B), np.int64) if tokens.step_N is None else tokens.step_N[start_B]
    order_B = np.lexsort((count_B, step_B))
    begin = 0
    while begin < len(order_B):
        end = begin + 1
        while (
            end < len(order_B)
            and step_B[order_B[end]] == step_B[order_B[begin]]
            and count_B[order_B[end]] * (end + 1 - begin) <= CHUNK_TOKENS
        ):
            end += 1
        chosen_B = order_B[begin:end]
        offset_L = np.arange(count_B[chosen_B].max())
        inside_BL = offset_L < count_B[chosen_B][:, None]
        yield np.where(inside_BL, start_B[chosen_B][:, None] + offset_L, 0), inside_BL
        begin = end


def _pad(column_N: np.ndarray, index_BL: NDArray[np.int64], inside_BL: NDArray[np.bool_]) -> Tensor:
    """The column in the block's shape, zero outside."""
    return torch.from_numpy(np.where(inside_BL, column_N[index_BL], np.zeros((), column_N.dtype)))


def _row(tokens: Tokens, index_BL: NDArray[np.int64], at: TokenMismatch) -> Row:
    place = int(index_BL[at.sequence, at.position])
    sequence = int(tokens.sequence_N[place])
    return Row(
        step=None if tokens.step_N is None else int(tokens.step_N[place]),
        token="" if tokens.token_N is None else tokens.vocabulary[tokens.token_N[place]],
        at=TokenMismatch(
            sequence=sequence,
            position=at.position,
            token_id=-1 if tokens.token_id_N is None else int(tokens.token_id_N[place]),
            old_logprob=at.old_logprob,
            rollout_logprob=at.rollout_logprob,
        ),
    )


@dataclass(frozen=True)
class Labelling:
    """A title, every token's label, and the labels' names (None: the number itself). worst: show only that many."""

    title: str
    label_N: NDArray[np.integer]
    names: Sequence[str] | None = None
    worst: int | None = None

    def table(self, sums: dict[int, list[float]]) -> dict[str, dict[str, float]]:
        """Means by label name, in label order or, with `worst`, by falling k3."""
        rows = {str(k) if self.names is None else self.names[k]: label_means(sums[k]) for k in sorted(sums)}
        if self.worst is None:
            return rows
        return {name: rows[name] for name in sorted(rows, key=lambda name: -rows[name]["k3"])[: self.worst]}


def _labellings(tokens: Tokens) -> list[Labelling]:
    found = []
    if tokens.token_N is not None:
        special = [i for i, text in enumerate(tokens.vocabulary) if text.startswith("<") and text.endswith(">")]
        class_V = token_classes(
            torch.arange(len(tokens.vocabulary)), tokens=tokens.vocabulary, eos_ids=[], special_ids=special
        ).numpy()
        found.append(Labelling("token class", class_V.astype(np.int8)[tokens.token_N], TOKEN_CLASSES))
    if tokens.entropy_N is not None:
        usable_N = tokens.mask_N & np.isfinite(tokens.entropy_N)
        decile_N = deciles(torch.from_numpy(tokens.entropy_N)[None], torch.from_numpy(usable_N)[None])[0].numpy()
        found.append(
            Labelling(
                "entropy decile", np.where(usable_N, decile_N, 10).astype(np.int8), (*map(str, range(10)), "unknown")
            )
        )
    if tokens.version_N is not None and tokens.step_N is not None:
        steps, index_N = np.unique(tokens.step_N, return_inverse=True)
        newest_S = np.full(len(steps), -1, np.int32)
        np.maximum.at(newest_S, index_N, tokens.version_N)
        found.append(Labelling("versions behind the newest of its step", newest_S[index_N] - tokens.version_N))
    if tokens.group_N is not None:
        found.append(Labelling(f"worst of {len(tokens.groups)} groups", tokens.group_N, tokens.groups, worst=10))
    return found
