"""Reward scores made honest: scorers with one contract, calibration, the metrics that judge it, and the files that carry it.

Importing this loads nothing heavy; each public name is loaded when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib

HOMES = {
    "ScoringParams": "rlalign.scoring.params",
    "ScoreResult": "rlalign.scoring.result",
    "HFScorer": "rlalign.scoring.hf",
    "VLLMScorer": "rlalign.scoring.vllm_scorer",
    "HTTPScorer": "rlalign.scoring.http",
    "with_calibration": "rlalign.scoring.calibrated",
}

__all__ = list(HOMES)


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])
