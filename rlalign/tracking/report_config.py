"""What a run was configured as, and how the configurations of several runs differ."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rlalign.tracking.record import RunRecord
from rlalign.tracking.report_page import details, esc, table


def flatten(config: dict, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def config_differences(runs: Sequence[RunRecord]) -> list[str]:
    """Dotted keys whose values are not the same in all runs. Names and places are not part of an experiment."""
    flats = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    skipped = ("name", "output_dir", "overwrite")
    return [k for k in keys if k not in skipped and len({json.dumps(f.get(k, "(absent)")) for f in flats}) > 1]


def difference_table(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """The configuration keys that differ, one column per run."""
    flats, keys = [flatten(run.config) for run in runs], config_differences(runs)
    rows = [[f"<code>{esc(k)}</code>", *(f"<code>{esc(f.get(k, '(absent)'))}</code>" for f in flats)] for k in keys]
    return table(["key", *names], rows) if rows else '<p class="lead">The configurations are the same.</p>'


def config_details(run: RunRecord, name: str) -> str:
    """The resolved configuration and the environment, closed."""
    config = "\n".join(f"{k}: {json.dumps(v)}" for k, v in flatten(run.config).items())
    environment = "\n".join(f"{k}: {json.dumps(v)}" for k, v in flatten(run.environment).items())
    return details(f"Configuration {name}", f"<pre>{esc(config)}</pre>") + details(
        f"Environment {name}", f"<pre>{esc(environment)}</pre>"
    )
