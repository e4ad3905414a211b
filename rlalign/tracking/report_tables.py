"""The report's tables: headline cards, numbers side by side, heads, publishes, tokens, events."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from rlalign.tracking.record import RunRecord
from rlalign.tracking.report_page import NOTHING, esc, num, prose, short, table, token_text
from rlalign.tracking.report_tokens import TokenView
from rlalign.tracking.report_verdict import k3_limit

HEAD_COLUMNS = 8  # groups of ranks shown; a healthy run has one


@dataclass(frozen=True, slots=True)
class Row:
    """One number of the summary. times: its difference is told as a factor, not as a subtraction."""

    label: str
    path: str
    spec: str = ".3g"
    times: bool = False


ROWS = (
    Row("Steps", "steps", ",.0f"),
    Row("Reward, first 10 %", "reward_first", ".3f"),
    Row("Reward, last 10 %", "reward_last", ".3f"),
    Row("Held-out accuracy, first", "eval_first", ".3f"),
    Row("Held-out accuracy, last", "eval_last", ".3f"),
    Row("k3, median over steps", "mismatch.lag0.k3", ".2e", times=True),
    Row("k3, worst step", "mismatch.lag0.k3_max", ".2e", times=True),
    Row("k1, median", "mismatch.lag0.k1", ".2e"),
    Row("|log_ratio|, mean", "mismatch.lag0.abs_mean", ".2e", times=True),
    Row("|log_ratio|, p99", "mismatch.lag0.p99", ".2e", times=True),
    Row("|log_ratio|, worst token", "mismatch.lag0.abs_max", ".2e", times=True),
    Row("Pearson of probabilities", "mismatch.lag0.pearson", ".8f"),
    Row("Effective sample size", "mismatch.lag0.ess", ".6f"),
    Row("Tokens that are not finite", "mismatch.nonfinite", ",.0f"),
    Row("Head alone: k3", "head_isolated.k3", ".2e", times=True),
    Row("Head alone: |log_ratio|, mean", "head_isolated.abs_mean", ".2e", times=True),
    Row("Head alone: |log_ratio|, p99", "head_isolated.p99", ".2e", times=True),
    Row("Head alone: |log_ratio|, worst", "head_isolated.abs_max", ".2e", times=True),
    Row("Head alone: rollout to float64, mean", "head_isolated.rollout_error", ".2e", times=True),
    Row("Head alone: trainer to float64, mean", "head_isolated.trainer_error", ".2e", times=True),
    Row("Head dtype", "head.dtype"),
    Row("Head mode", "head.mode"),
    Row("Ranks", "head.ranks", ",.0f"),
    Row("Engine", "engine.version"),
    Row("Publishes", "publishes", ",.0f"),
    Row("Tensors repaired", "repaired", ",.0f"),
    Row("Head rebuilds", "rebuilds", ",.0f"),
    Row("Sampled tokens", "tokens", ",.0f"),
    Row("Seconds in steps", "seconds", ",.1f"),
    Row("Tokens per second", "tokens_per_s", ",.0f", times=True),
)


def at(summary: dict, path: str) -> object:
    """A value of a nested dictionary by its dotted path, None where there is none."""
    value: object = summary
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def numbers_table(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Every headline number of every run; from the second run on also its difference from the first."""
    head = ["", names[0], *(cell for name in names[1:] for cell in (name, "difference"))]
    rows = []
    for row in ROWS:
        values = [at(run.summary, row.path) for run in runs]
        if all(value is None for value in values):
            continue
        cells = [num(values[0], row.spec)]
        for value in values[1:]:
            cells += [num(value, row.spec), f'<span class="diff">{difference(values[0], value, row)}</span>']
        rows.append([esc(row.label), *cells])
    return table(head, rows, cls="numbers")


def difference(a: object, b: object, row: Row) -> str:
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
        return "&times; " + num(factor, ".2e" if factor >= 1e5 or factor < 0.01 else ",.3g" if factor < 1e3 else ",.0f")
    # Eight decimals of a Pearson are for reading the value; its difference is read by its size.
    return num(b - a, "+.2e" if row.spec.endswith(("e", ".6f", ".8f")) else "+" + row.spec)


def cards(run: RunRecord) -> str:
    """The headline numbers of one run."""
    s, limit = run.summary, k3_limit(run)
    lag0, head = s["mismatch"]["lag0"], s.get("head", {})
    bound = f", limit {_short(limit)}" if limit is not None else ""
    versions = run.series("publish/version")[1]
    parts = [
        (
            "Reward, first and last 10 %",
            _from_to(s["reward_first"], s["reward_last"]),
            "mean over the sampled completions",
        ),
        (
            "Held-out accuracy, first and last",
            _from_to(s["eval_first"], s["eval_last"]),
            "mean reward on prompts never trained on",
        ),
        (
            "k3 at lag 0",
            _short(lag0["k3"]),
            f"median over steps, in nats; worst step {_short(lag0['k3_max'])}{bound}",
        ),
        ("Head", num(head.get("dtype")), f"{_mode(head)}; {_engine(run)}"),
        (
            "Publishes",
            num(s["publishes"], ",.0f"),
            f"the last is version {num(versions[-1] if versions else None, ',.0f')}; tensors repaired: "
            f"{num(s['repaired'], ',.0f')}; head rebuilds: {num(s['rebuilds'], ',.0f')}",
        ),
        (
            "Tokens per second",
            num(s["tokens_per_s"], ",.0f"),
            f"{num(s['tokens'], ',.0f')} sampled in {num(s['seconds'], ',.1f')} s of steps, training included",
        ),
    ]
    body = "".join(
        f'<div class="card"><h3>{title}</h3><div class="value">{value}</div><p>{note}</p></div>'
        for title, value, note in parts
    )
    return f'<div class="cards">{body}</div>'


def _from_to(first: float | None, last: float | None) -> str:
    if first is None or last is None:
        return NOTHING
    change = last - first
    tone = "" if change > 0 else ' class="down"'
    return f"{num(first, '.3f')} &rarr; {num(last, '.3f')} <small{tone}>{num(change, '+.3f')}</small>"


def _short(value: float | None) -> str:
    return NOTHING if value is None else f'<span class="whole">{short(value)}</span>'


def _mode(head: dict) -> str:
    if not head:
        return "the run ended before it was reported"
    return f"mode {num(head.get('mode'))} on {num(head.get('ranks'))} rank(s)"


def _engine(run: RunRecord) -> str:
    engine = run.summary.get("engine") or {"name": "vllm", "version": at(run.environment, "versions.vllm")}
    return f"{num(engine.get('name'))} {num(engine.get('version'))}"


def head_table(run: RunRecord) -> str:
    """What the ranks answered. Ranks that agree in everything but numbers share a column; numbers get a range."""
    groups: dict[str, list[dict]] = {}
    for i, status in enumerate(run.head_status):
        words = {k: v for k, v in status.items() if not isinstance(v, int | float)}
        groups.setdefault(json.dumps(words, sort_keys=True), []).append({"rank": i, **status})
    columns = list(groups.values())[:HEAD_COLUMNS]
    if not columns:
        return ""
    keys = [k for k in dict.fromkeys(k for status in run.head_status for k in status) if k not in ("rank", "pid")]
    rows = [[esc(key), *(_answer([s.get(key) for s in column]) for column in columns)] for key in keys]
    body = table(["", *(f"rank {_ranges(s['rank'] for s in column)}" for column in columns)], rows)
    hidden = len(groups) - len(columns)
    return body + (f'<p class="note">{hidden} more groups of ranks are in head_status.json.</p>' if hidden else "")


def _answer(values: Sequence[object]) -> str:
    """One value, or the range of differing numbers."""
    if all(value == values[0] for value in values):
        if isinstance(values[0], dict | list):
            words = [f"{k}: {v}" for k, v in values[0].items()] if isinstance(values[0], dict) else map(str, values[0])
            return f'<span class="wrap">{esc(", ".join(words))}</span>'
        return num(values[0], "")
    return f"{num(min(values), '')} to {num(max(values), '')}"


def _ranges(ranks: Iterable[object]) -> str:
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


def publish_table(run: RunRecord) -> str:
    """One row per publish."""
    keys = ("version", "seconds", "bytes", "tensors", "repaired", "rebuilds")
    specs = (",.0f", ".3f", ",.0f", ",.0f", ",.0f", ",.0f")
    rows = [
        [num(row["step"]), *(num(row.get(f"publish/{key}"), spec) for key, spec in zip(keys, specs, strict=True))]
        for row in run.metrics.rows
        if row.get("publish/version") is not None
    ]
    head = ["after step", "version", "seconds", "bytes", "tensors verified", "repaired", "head rebuilds"]
    return table(head, rows, cls="numbers") if rows else ""


def phase_table(phases: dict[str, Sequence[float]]) -> str:
    """Seconds per phase and their share of the sum."""
    total = sum(map(sum, phases.values())) or 1.0
    rows = [[esc(p), num(median(v), ".3f"), num(sum(v), ",.1f"), num(sum(v) / total, ".0%")] for p, v in phases.items()]
    return table(["phase", "median s", "total s", "share"], rows, cls="numbers")


def worst_table(view: TokenView) -> str:
    """The worst tokens with both log-probabilities and their neighbours."""
    rows = [
        [
            num(t.log_ratio, "+.2e"),
            f'<span class="mono context">{"".join(map(token_text, t.before))}<mark>{token_text(t.token)}</mark>'
            f"{''.join(map(token_text, t.after))}</span>",
            num(t.rollout_logprob, ".6f"),
            num(t.old_logprob, ".6f"),
            f"{t.step} / {t.sequence} / {t.position}",
            num(t.policy_version, ""),
            num(t.token_id, ""),
        ]
        for t in view.worst
    ]
    head = ["log_ratio", "token in context", "rollout", "trainer", "step / seq / pos", "version", "token id"]
    return table(head, rows)


def quantile_table(views: Sequence[TokenView], names: Sequence[str]) -> str:
    """Quantiles of |log_ratio| over all tokens in the files, exact."""
    rows = []
    for label, q in (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("largest", 1.0)):
        values = [float(np.quantile(v.abs_log_ratio, q)) if v.abs_log_ratio.size else None for v in views]
        rows.append([label, *(num(value, ".2e") for value in values)])
    shares = [float((v.abs_log_ratio == 0).mean()) if v.abs_log_ratio.size else None for v in views]
    rows.append(["exactly zero", *(num(share, ".1%") for share in shares)])
    rows.append(["not finite", *(num(v.nonfinite, ",") for v in views)])
    rows.append(["tokens", *(num(v.abs_log_ratio.size + v.nonfinite, ",") for v in views)])
    return table(["|log_ratio|", *names], rows, cls="numbers")


ALERTS = ("alert", "mismatch", "drift", "diagnosis")  # kinds of events that judge the numbers


def event_table(run: RunRecord, *, alerts: bool) -> str:
    """Alerts in order, or everything else that happened."""
    rows = [
        [
            f'<span title="{esc(e["time"])}">{esc(e["time"][11:19])}</span>',
            f"step {e['step']}" if e["step"] >= 0 else "start",
            esc(e["kind"]),
            f'<span class="wrap">{prose(e["message"])}</span>',
        ]
        for e in run.events
        if (e["kind"].partition("/")[0] in ALERTS) == alerts
    ]
    return table(["UTC", "after", "kind", "message"], rows, cls="events") if rows else ""
