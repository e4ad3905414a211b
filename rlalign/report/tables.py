"""Rows of the run page's tables: numbers, heads, publishes, phases, quantiles, events, configurations, attribution."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow
from markupsafe import Markup

from rlalign.report.charts import FLOOR
from rlalign.report.drawings import heat_legend, heat_map, scale_of
from rlalign.report.html import MACROS, NOTHING, figure, num
from rlalign.report.plots import at, series
from rlalign.tracking import files
from rlalign.tracking.record import RunRecord
from rlalign.tracking.token_files import read_tokens

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


__all__ = [
    "TokenView", "WorstToken", "body_rows", "cause_rows", "config_differences", "events", "flatten", "head_table", "number_rows",
    "phase_rows", "positions", "publish_rows", "quantile_rows", "read_attribution", "view_tokens",
]  # fmt: skip

HEAD_COLUMNS = 8  # groups of ranks shown; a healthy run has one


@dataclass(frozen=True, slots=True)
class Row:
    """One number of the summary. times: its difference is told as a factor, not as a subtraction."""

    label: str
    path: str
    spec: str = ".3g"
    times: bool = False


# fmt: off
ROWS = (
    Row("Steps", "steps", ",.0f"),
    Row("Reward, first 10 %", "reward_first", ".3f"), Row("Reward, last 10 %", "reward_last", ".3f"),
    Row("Held-out accuracy, first", "eval_first", ".3f"), Row("Held-out accuracy, last", "eval_last", ".3f"),
    Row("k3, median over steps", "mismatch.lag0.k3", ".2e", times=True),
    Row("k3, worst step", "mismatch.lag0.k3_max", ".2e", times=True),
    Row("k1, median", "mismatch.lag0.k1", ".2e"),
    Row("|log_ratio|, mean", "mismatch.lag0.abs_mean", ".2e", times=True),
    Row("|log_ratio|, p99", "mismatch.lag0.p99", ".2e", times=True),
    Row("|log_ratio|, worst token", "mismatch.lag0.abs_max", ".2e", times=True),
    Row("Pearson of probabilities", "mismatch.lag0.pearson", ".8f"),
    Row("Effective sample size", "mismatch.lag0.ess", ".6f"),
    Row("Tokens that are not finite", "mismatch.nonfinite", ",.0f"),
    *(Row(f"Head alone: {label}", f"head_isolated.{name}", ".2e", times=True) for name, label in {
        "k3": "k3", "abs_mean": "|log_ratio|, mean", "p99": "|log_ratio|, p99", "abs_max": "|log_ratio|, worst",
        "rollout_error": "rollout to float64, mean", "trainer_error": "trainer to float64, mean"}.items()),
    Row("Head dtype", "head.dtype"), Row("Head mode", "head.mode"), Row("Ranks", "head.ranks", ",.0f"),
    Row("Engine", "engine.version"), Row("Publishes", "publishes", ",.0f"), Row("Tensors repaired", "repaired", ",.0f"),
    Row("Head rebuilds", "rebuilds", ",.0f"), Row("Sampled tokens", "tokens", ",.0f"),
    Row("Seconds in steps", "seconds", ",.1f"), Row("Tokens per second", "tokens_per_s", ",.0f", times=True),
)
# fmt: on


def number_rows(runs: Sequence[RunRecord]) -> list[list[Markup]]:
    """Every headline number of every run; from the second run on also its difference from the first."""
    rows = []
    for row in ROWS:
        values = [at(run.summary, row.path) for run in runs]
        if all(value is None for value in values):
            continue
        cells = [Markup.escape(row.label), num(values[0], row.spec)]
        for value in values[1:]:
            differs = Markup('<span class="diff">{}</span>').format(difference(values[0], value, row))
            cells += [num(value, row.spec), differs]
        rows.append(cells)
    return rows


def difference(a: Any, b: Any, row: Row) -> str:
    """b against a: a factor for quantities that live on a log scale, else b - a; text is the same or different."""
    if isinstance(a, str) or isinstance(b, str):
        return "same" if a == b else "different"
    if a is None or b is None:
        return NOTHING
    if a == b:
        return "same"
    if row.times:
        if a <= 0 or b <= 0:
            return num(b - a, "+.2e")
        factor = b / a
        return "\u00d7 " + num(factor, ".2e" if factor >= 1e5 or factor < 0.01 else ",.3g" if factor < 1e3 else ",.0f")
    # Eight decimals of a Pearson are for reading the value; its difference is read by its size.
    return num(b - a, "+.2e" if row.spec.endswith(("e", ".6f", ".8f")) else "+" + row.spec)


def cause_rows(runs: Sequence[RunRecord]) -> list[list[Markup]]:
    """Median k3 of engine, staleness and floor, for every run; a part without a number says why it has none."""
    rows = []
    for key in ("mismatch/lag0/k3", "staleness/k3", FLOOR):
        cells = []
        for run in runs:
            values = [value for value in series(run, key)[1] if math.isfinite(value)]
            fresh = key == "staleness/k3" and set(run.series("staleness/policy/max")[1]) == {0.0}
            missing = Markup('<span class="none">{}</span>').format("no such token" if fresh else "not measured")
            cells.append(num(median(values), ".2e") if values else missing)
        rows.append(cells)
    return rows


def head_table(run: RunRecord) -> tuple[list[str], list[list[Markup]], int]:
    """Head, rows and how many columns are left out: ranks that agree in everything but numbers share one."""
    groups: dict[str, list[dict]] = {}
    for i, status in enumerate(run.head_status):
        words = {k: v for k, v in status.items() if not isinstance(v, int | float)}
        groups.setdefault(json.dumps(words, sort_keys=True), []).append({"rank": i, **status})
    columns = list(groups.values())[:HEAD_COLUMNS]
    keys = [k for k in dict.fromkeys(k for status in run.head_status for k in status) if k not in ("rank", "pid")]
    rows = [[num(key), *(_answer([s.get(key) for s in column]) for column in columns)] for key in keys]
    return ["", *(f"rank {_ranges(s['rank'] for s in column)}" for column in columns)], rows, len(groups) - len(columns)


def _answer(values: Sequence[Any]) -> Markup:
    """One value, or the range of differing numbers."""
    first = values[0]
    if any(value != first for value in values):
        return Markup("{} to {}").format(num(min(values), ""), num(max(values), ""))
    if isinstance(first, dict | list):
        words = [f"{k}: {v}" for k, v in first.items()] if isinstance(first, dict) else map(str, first)
        return MACROS["wrap"](", ".join(words))
    return num(first, "")


def _ranges(ranks: Iterable[Any]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"; anything that is not all numbers as a list."""
    ranks = list(ranks)
    if not all(isinstance(r, int) for r in ranks):
        return ", ".join(map(str, ranks))
    spans: list[list[int]] = []
    for r in sorted(ranks):
        if spans and r == spans[-1][1] + 1:
            spans[-1][1] = r
        else:
            spans.append([r, r])
    return ", ".join(f"{a}" if a == b else f"{a}\u2013{b}" for a, b in spans)


def body_rows(run: RunRecord) -> list[list[Markup]]:
    """What the probe of a mirrored body found, op by op; nothing for one that is not mirrored."""
    ops = (run.summary.get("body") or {}).get("ops", [])
    names = ("prefill before", "prefill after", "decode before", "decode after")
    return [[*(num(row[n]) for n in ("op", "part", "variant")), *(num(row[n], ".3%") for n in names)] for row in ops]


PUBLISHED = {
    "version": ",.0f", "seconds": ".3f", "bytes": ",.0f", "tensors": ",.0f", "repaired": ",.0f", "rebuilds": ",.0f"
}  # fmt: skip


def publish_rows(run: RunRecord) -> list[list[Markup]]:
    """One row per publish."""
    found = [row for row in run.metrics.rows if row.get("publish/version") is not None]
    return [[num(row["step"]), *(num(row.get(f"publish/{k}"), spec) for k, spec in PUBLISHED.items())] for row in found]


def phase_rows(phases: Mapping[str, Sequence[float]]) -> list[list[Markup]]:
    """Seconds per phase and their share of the sum."""
    total = sum(map(sum, phases.values())) or 1.0
    return [[num(p), num(median(v), ".3f"), num(sum(v), ",.1f"), num(sum(v) / total, ".0%")] for p, v in phases.items()]


def quantile_rows(views: Sequence[TokenView]) -> list[list[str]]:
    """Quantiles of |log_ratio| over all tokens in the files, exact."""

    def over(of: Callable[[np.ndarray], float], spec: str) -> list[Markup]:
        return [num(float(of(v.abs_log_ratio)) if v.abs_log_ratio.size else None, spec) for v in views]

    shares = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "largest": 1.0}
    return [
        *([label, *over(lambda x, q=q: float(np.quantile(x, q)), ".2e")] for label, q in shares.items()),
        ["exactly zero", *over(lambda x: (x == 0).mean(), ".1%")],
        ["not finite", *(num(v.nonfinite, ",") for v in views)],
        ["tokens", *(num(v.abs_log_ratio.size + v.nonfinite, ",") for v in views)],
    ]


JUDGES = ("alert", "mismatch", "drift", "diagnosis")  # kinds of events that judge the numbers


def events(run: RunRecord, *, alerts: bool) -> list[dict]:
    """Alerts in order, or everything else that happened."""
    return [e for e in run.events if (e["kind"].partition("/")[0] in JUDGES) == alerts]


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def config_differences(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """{dotted key: value of each run} where they are not the same. Names and places are not part of an experiment."""
    flats = [flatten(run.config) for run in runs]
    values = {key: [flat.get(key, "(absent)") for flat in flats] for flat in flats for key in flat}
    for skipped in ("name", "output_dir", "overwrite"):
        values.pop(skipped, None)
    return {key: found for key, found in values.items() if len({json.dumps(value) for value in found}) > 1}


def positions(route: str, heat: Mapping[str, Sequence[float | None]], layers: int, length: int) -> Markup:
    """The accumulated difference of the residual stream, after embedding, layers, norm and logits."""
    named = [("embed", "embed"), *((f"layers.{i}.residual", f"layer {i}") for i in range(layers))]
    named += [("final_norm", "final norm"), ("logits", "logits"), ("logprobs", "logprobs")]
    rows = [(label, heat[point]) for point, label in named if point in heat]
    scale = scale_of([v for _, values in rows for v in values])
    bins = max(len(values) for _, values in rows)
    drawn = heat_map(rows, [str(round(c * length / bins)) for c in range(bins)], scale, axis="position")
    ends = heat_legend(scale, low=num(scale.low, ".1e"), high=num(scale.high, ".1e"))
    return figure(drawn, f"Accumulated difference, {route}", "", ends, wide=True)


def read_attribution(run: RunRecord) -> Markup:
    """Its sentence and its heat maps; empty for a run that has none."""
    path = run.directory / files.ATTRIBUTION
    if not path.exists():
        return Markup()
    try:
        found = files.read_json(path)
        maps = [positions(name, r["heat"], found["layers"], found["length"]) for name, r in found["routes"].items()]
        return Markup("<p>{}</p>").format(_said(found)) + Markup().join(maps)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # a page must come out of every run
        words = Markup(
            '<p class="bad">{} cannot be shown: {}. <code>rlalign attribute --run</code> writes it anew.</p>'
        )
        return words.format(files.ATTRIBUTION, repr(error))


def _said(found: Mapping) -> Markup:
    """One sentence a route: the first step over its floor, and whose logprobs."""
    parts = []
    for name, route in found["routes"].items():
        first, shares = route["first_over_floor"], route["logprob_share"]
        worst = max(shares.items(), key=lambda item: item[1], default=None)
        says = f"{first} differs by itself" if first else "no step is over its noise floor"
        share = f", {worst[1]:.0%} of its square from {worst[0]}" if worst else ""
        delta = num(route["delta_logp"]["abs_mean"], ".1e")
        parts.append(Markup("<b>{}</b>: {}; mean |delta logp| {} nats{}").format(name, says, delta, share))
    about = f"{found['sequences']:,} sequences, {found['scored_tokens']:,} scored tokens"
    return Markup("{}. Measured on {}; attribution.html beside the run has every number.").format(
        Markup(". ").join(parts), about
    )
