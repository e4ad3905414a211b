"""What the token files say: the distribution of |log_ratio| over sampled tokens, and the worst in their context."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow

from rlalign.tracking.token_files import read_tokens

__all__ = ["TokenView", "WorstToken", "view_tokens"]

WORST = 12
BEFORE, AFTER = 6, 3  # tokens of context around a worst token


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstToken:
    """One token with a large |log_ratio|; before and after: its neighbours' texts. Logprobs in nats."""

    step: int
    sequence: int
    position: int
    token_id: int
    token: str
    rollout_logprob: float
    old_logprob: float
    log_ratio: float
    policy_version: int
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def rank(self) -> float:
        """Sort key: a log-ratio that is not finite is worse than any number."""
        return abs(self.log_ratio) if np.isfinite(self.log_ratio) else np.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenView:
    """abs_log_ratio: finite |log_ratio| of every sampled token in the files, sorted. nonfinite: how many had none."""

    steps: tuple[int, ...]
    abs_log_ratio: np.ndarray
    nonfinite: int
    worst: tuple[WorstToken, ...]


def view_tokens(paths: tuple[Path, ...]) -> TokenView | None:
    """Read the token files one by one; None when there is none. Raises ValueError for a damaged file."""
    steps, ratios, worst, nonfinite = [], [], [], 0
    for path in paths:
        table = read_tokens(path)
        sampled = table.filter(table["loss_mask"])
        if not sampled.num_rows:
            continue
        ratio = np.abs(sampled["log_ratio"].to_numpy().astype(np.float64))
        finite = np.isfinite(ratio)
        steps.append(int(sampled["step"][0].as_py()))
        ratios.append(ratio[finite])
        nonfinite += int((~finite).sum())
        order = np.argsort(-np.where(finite, ratio, np.inf), kind="stable")[:WORST]
        worst += [_in_context(table, sampled.slice(int(row), 1).to_pylist()[0]) for row in order]
    if not steps:
        return None
    worst.sort(key=lambda token: -token.rank)
    return TokenView(
        steps=tuple(steps),
        abs_log_ratio=np.sort(np.concatenate(ratios)),
        nonfinite=nonfinite,
        worst=tuple(token for token in worst[:WORST] if token.rank > 0),
    )


def _in_context(table: pyarrow.Table, row: dict) -> WorstToken:
    sequence = table["sequence"].to_numpy() == row["sequence"]
    positions, tokens = table["position"].to_numpy()[sequence], table["token"].to_numpy(zero_copy_only=False)[sequence]
    order = np.argsort(positions)
    at = int(np.searchsorted(positions[order], row["position"]))
    texts = [str(token) for token in tokens[order]]
    fields = ("step", "sequence", "position", "token_id", "token", "policy_version")
    logprobs = ("rollout_logprob", "old_logprob", "log_ratio")
    return WorstToken(
        **{name: row[name] for name in (*fields, *logprobs)},
        before=tuple(texts[max(0, at - BEFORE) : at]),
        after=tuple(texts[at + 1 : at + 1 + AFTER]),
    )
