"""Parity as a Markdown table, and a stored result as the bar for a new one, for the CI of users who upgrade an engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlalign.diagnose.parity.grid import COLUMNS, ERRORS
from rlalign.rollout.engine import noise_floor
from rlalign.tracking import environment

FLOORS = ("floor_k3", "floor_abs_mean", "rounding_k3", "rounding_abs_mean")
Row = Mapping[str, Any]


def markdown(result: Mapping) -> str:
    """Every table that was measured. Nats per token, on the same tokens.

    `floor`: the rollout engine against itself; `rounding`: the trainer against itself with a float32 body.
    """
    where = ", ".join(f"{name} {version}" for name, version in result["identity"]["versions"].items())
    lines = [f"`rlalign parity` of {result['model']} ({where}), tokens {result['tokens']}", ""]
    lines += [f"- {note}" for note in result["notes"]] + [""] * bool(result["notes"])
    lines += _pairs("whole model", result["rows"], (*COLUMNS, *FLOORS))
    lines += _pairs("head in isolation", result["head_isolated"], (*COLUMNS, *ERRORS))
    if result["settings"]:
        lines += _settings(result["settings"])
    if "noise_floor" in result:
        lines.append(noise_floor.markdown(result["noise_floor"]))
    return "\n".join(lines)


def name_of(row: Row) -> str:
    """One row in words: body, tensor parallel, setting, heads."""
    asked = f"{row['body_dtype']} body, TP {row['tensor_parallel']}, {row['path']}, temperature {row['temperature']:g}"
    asked += f", batch {row['batch']}" if row["batch"] else ""
    asked += f", context {row['context']}" if row["context"] else ""
    return f"{asked}, heads {rollout_head(row)} / {row['trainer_head']}"


def rollout_head(row: Row) -> str:
    """The rollout side's head with the way vLLM reaches it, where there is more than one."""
    return f"float32 ({row['mode']})" if row["rollout_head"] == "float32" else str(row["rollout_head"])


def _pairs(title: str, rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    header = ["body", "TP", "rollout head", "trainer head", *columns]
    lines = [f"**{title}** (nats per token)", "", _line(header), "|---" * 4 + "|--:" * len(columns) + "|"]
    for row in rows:
        numbers = ["" if c not in row else f"{row[c]:.9f}" if c == "pearson" else f"{row[c]:.2e}" for c in columns]
        lines.append(
            _line([row["body_dtype"], row["tensor_parallel"], rollout_head(row), row["trainer_head"], *numbers])
        )
    return [*lines, ""]


def _settings(rows: Sequence[Row]) -> list[str]:
    """One line a setting, one column a pair of equal heads: k3, and the floor's k3 in brackets."""
    pairs = list(dict.fromkeys(rollout_head(row) for row in rows))
    header = ["body", "TP", "path", "temperature", "batch", "context", *(f"{p} on both" for p in pairs)]
    lines = ["**one setting at a time, equal heads on both sides**: k3 (floor), nats per token", ""]
    lines += [_line(header), "|---" * 6 + "|--:" * len(pairs) + "|"]
    cells: dict[tuple, dict[str, str]] = {}
    for row in rows:
        setting = (row["body_dtype"], row["tensor_parallel"], row["path"], f"{row['temperature']:g}")
        setting += (row["batch"] or "all", row["context"] or "as given")
        cells.setdefault(setting, {})[rollout_head(row)] = f"{row['k3']:.2e} ({row['floor_k3']:.1e})"
    lines += [_line([*setting, *(found.get(p, "") for p in pairs)]) for setting, found in cells.items()]
    return [*lines, ""]


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


KEY = ("body_dtype", "tensor_parallel", "path", "temperature", "batch", "context", "mode", "trainer_head")
TABLES = {"rows": "whole model", "settings": "whole model", "head_isolated": "head in isolation"}
PACKAGES = ("rlalign", "vllm", "torch", "transformers")
ROUNDING = 1e-6  # nats: what a float32 logprob can move by rounding alone; below it nothing is worse


def identity(model: Path) -> dict:
    """What a result belongs to: the model's architecture as a digest, and the versions it was measured with."""
    config = json.loads((model / "config.json").read_text())
    architecture = {k: v for k, v in sorted(config.items()) if k not in ("transformers_version", "_name_or_path")}
    digest = hashlib.sha256(json.dumps(architecture).encode()).hexdigest()[:16]
    versions = environment.snapshot()["versions"]
    return {"architecture": digest, "versions": {name: versions[name] for name in PACKAGES}}


def read(path: Path) -> dict:
    """A file that `rlalign parity --json FILE` wrote. Raises ValueError for anything else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--baseline {path}: cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(found, dict) or not {"identity", *TABLES} <= found.keys():
        raise ValueError(f"--baseline {path}: not a result of this `rlalign parity`; write one with --json FILE")
    return found


def check_same_model(baseline: Mapping, model: Path) -> None:
    """Raise ValueError when the baseline is of another architecture: its numbers say nothing about this one."""
    was, now = baseline["identity"]["architecture"], identity(model)["architecture"]
    if was != now:
        raise ValueError(
            f"--baseline: measured on {baseline['model']} with another architecture (config digest {was}, here {now}); "
            "measure a baseline of this model with --json FILE"
        )


def regressions(result: Mapping, baseline: Mapping, *, tolerance: float) -> list[str]:
    """One line for every figure of the baseline that got worse or is gone.

    Worse: mean |log_ratio| over `tolerance` times the larger of its old value and the present noise floor, and over float32
    rounding. The mean is judged and not k3, which a single token can move. Not a number is worse than any number.
    """
    found = []
    for table, title in TABLES.items():
        now = {tuple(row[k] for k in KEY): row for row in result[table]}
        for row in baseline[table]:
            here = now.get(tuple(row[k] for k in KEY))
            if here is None:
                found.append(f"{title}, {name_of(row)}: in the baseline, not measured now; use the same options")
                continue
            bar = max(tolerance * max(row["abs_mean"], here.get("floor_abs_mean", 0.0)), ROUNDING)
            if not here["abs_mean"] <= bar:
                found.append(
                    f"{title}, {name_of(row)}: mean |log_ratio| {here['abs_mean']:.3g}, was {row['abs_mean']:.3g} (bar {bar:.3g})"
                )
    return found


def changed_versions(result: Mapping, baseline: Mapping) -> str:
    """What is installed now and was not then, as text; empty when nothing changed."""
    was, now = baseline["identity"]["versions"], result["identity"]["versions"]
    return ", ".join(f"{name} {was.get(name)} -> {now[name]}" for name in now if was.get(name) != now[name])
