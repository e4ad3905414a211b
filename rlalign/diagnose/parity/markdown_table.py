"""The result of parity as Markdown, ready to paste into a pull request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlalign.diagnose.parity.grid import COLUMNS, ERRORS
from rlalign.rollout.engine import noise_floor

FLOORS = ("floor_k3", "floor_abs_mean", "rounding_k3", "rounding_abs_mean")
Row = Mapping[str, object]


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


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
