"""What the page says first: two sentences made from the numbers, and every problem the numbers show."""

from __future__ import annotations

import math
from statistics import median

from rlalign.mismatch.causes import Followed, follows
from rlalign.report.figures import k3_limit, number_at
from rlalign.report.html import short
from rlalign.tracking.record import RunRecord
from rlalign.types import LogprobSpec

__all__ = ["comparison", "drift_problems", "growth", "problems", "sentences", "watched"]

DRIFT, DRIFTED = "reward/drift/", 2
ENDINGS = {"running": "is still running", "interrupted": "was interrupted", "killed": "was killed"}
IDENTITY = ("class", "mode", "rlalign", "vllm", "policy_version")  # what must be the same on every rank


def problems(run: RunRecord) -> list[str]:
    """Everything in a run that a reader has to know before believing its curves; empty when there is nothing."""
    found, lag0 = [], run.summary["mismatch"]["lag0"]
    if run.status != "finished":
        found.append(f"The run {ENDINGS.get(run.status, run.status)}" + (f": {run.message}" if run.message else "."))
    if run.metrics.torn is not None:
        found.append(
            "The last line of metrics.jsonl is torn: the process was killed while it wrote. It is left out here."
        )
    if lag0["k3"] is None:
        found.append("The mismatch at lag 0 was never measured, so nothing here says whether the ratios are right.")
    limit, (steps, values) = k3_limit(run), run.series("mismatch/lag0/k3")
    # Written so that NaN is over every limit.
    over = [] if limit is None else [step for step, value in zip(steps, values, strict=True) if not value <= limit]
    if limit is not None and over:
        lost = sum(not math.isfinite(value) for value in values)
        missing = f", {lost} not finite" if lost else ""
        found.append(
            f"k3 was over its limit {short(limit)} on {len(over)} of {len(steps)} steps (first: step {over[0]}, "
            f"largest finite value: {short(lag0['k3_max'] or 0.0)}{missing})."
        )
    if run.summary["mismatch"]["nonfinite"]:
        found.append(f"{run.summary['mismatch']['nonfinite']:,.0f} sampled tokens had no finite log-ratio.")
    raised = [e for e in run.events if e["kind"].startswith("alert/") and e["kind"] != "alert/log"]
    if raised:
        first = raised[0]["message"].partition("\n")[0]
        count = "An alert was" if len(raised) == 1 else f"{len(raised)} alerts were"
        found.append(f"{count} raised; the first, after step {raised[0]['step']}: {first}")
    return found + _learning(run) + drift_problems(run) + _head_problems(run)


def _learning(run: RunRecord) -> list[str]:
    s, names = run.summary, {"reward": "Reward", "eval": "Held-out accuracy"}
    if run.status != "finished" or s["steps"] <= 1:
        return []
    ends = [(name, s[f"{key}_first"], s[f"{key}_last"]) for key, name in names.items()]
    return [
        f"{name} did not rise: {first:.3f} at the start, {last:.3f} at the end."
        for name, first, last in ends
        if first is not None and last <= first
    ]


def watched(run: RunRecord) -> list[str]:
    """Names of the reward models whose drift the run has watched."""
    keys = {key for row in run.metrics.rows for key in row if key.startswith(DRIFT)}
    return sorted({key.removeprefix(DRIFT).partition("/")[0] for key in keys})


def drift_problems(run: RunRecord) -> list[str]:
    """One sentence for every reward model that the monitor saw drift."""
    found = []
    for name in watched(run):
        steps, states = run.series(f"{DRIFT}{name}/state")
        if bad := [step for step, state in zip(steps, states, strict=True) if state == DRIFTED]:
            found.append(
                f"The reward model {name} drifted from the verifier on {len(bad)} of {len(steps)} reports (first: step "
                f"{bad[0]:.0f}, last: step {bad[-1]:.0f})."
            )
    return found


def _head_problems(run: RunRecord) -> list[str]:
    found = []
    for key in IDENTITY:
        answers = sorted({str(status[key]) for status in run.head_status if key in status})
        if len(answers) > 1:
            found.append(f"The ranks do not have the same head: {key} is {' and '.join(answers)}.")
    wanted, got = run.config.get("head_dtype"), run.summary.get("head", {}).get("dtype")
    if wanted and got and wanted != got:
        found.append(f"The configuration asks for a {wanted} head; the engine reports {got}.")
    if run.status == "finished" and not run.head_status:
        found.append("No rank reported its head, so it is not known which head computed these numbers.")
    return found


def sentences(run: RunRecord) -> str:
    """Two sentences: what was learned, and how well the two engines agree."""
    s = run.summary
    lag0, limit = s["mismatch"]["lag0"], k3_limit(run)
    learned = f"Over {s['steps']:,} steps"
    if s["reward_first"] is None:
        learned += " no reward was logged"
    else:
        learned += f" the mean reward went from {s['reward_first']:.3f} to {s['reward_last']:.3f}"
    if s["eval_first"] is not None:
        learned += f" and held-out accuracy from {s['eval_first']:.3f} to {s['eval_last']:.3f}"
    if lag0["k3"] is None:
        return f"{learned}."
    agree = f"Rollout engine and trainer differ by k3 = {short(lag0['k3'])} nats per token at lag 0 (median over steps"
    agree += f"; worst step {short(lag0['k3_max'])}" + (f", limit {short(limit)})" if limit is not None else ")")
    agree += f", with {s['publishes']:,} publishes verified" if s["publishes"] else ""
    return f"{learned}. {agree}.{_support(run)}{_growth(run)}"


def growth(run: RunRecord) -> list[Followed]:
    """What k3 at lag 0 follows of trace/* and the entropy, over the steps that were traced; empty where too few were."""
    wanted = "mismatch/lag0/k3"
    rows = [row for row in run.metrics.rows if any(key.startswith("trace/") for key in row)]
    rows = [row for row in rows if math.isfinite(row.get(wanted, math.nan))]
    names = [key for key in (rows[0] if rows else ()) if key.startswith("trace/") or key == "train/entropy"]
    whole = [name for name in names if all(math.isfinite(row.get(name, math.nan)) for row in rows)]
    return follows([row[wanted] for row in rows], {name: [row[name] for row in rows] for name in whole})


def _growth(run: RunRecord) -> str:
    """A sentence on what the k3 follows; empty without a trace."""
    found = growth(run)
    if not found:
        return ""
    best = [f for f in found if f.beyond_chance][:3]
    chance = f"beyond the {found[0].chance:.2f} of chance (rank correlation of changes from row to row)"
    if not best:
        return f" Of {len(found)} traced series none changes with k3 {chance}."
    told = "; ".join(f"{f.name} ({f.changes:+.2f}, {f.lead} rows ahead)" for f in best)
    return f" k3 changes with {told}, {chance}."


def _support(run: RunRecord) -> str:
    """A sentence on the sets that a truncated run's probabilities are over; empty where nothing was truncated."""
    spec = LogprobSpec.of_sampling(run.config.get("rollout", {}), processed=True)
    if not spec.truncated:
        return ""
    size, mass, outside = (
        median(run.series(f"support/{name}")[1] or [math.nan]) for name in ("size_mean", "log_mass", "outside")
    )
    return (
        f" Ratios, entropies and KLs are over {spec.support}: {size:.1f} ids a token, with a log mass of {mass:+.3g} nats; "
        f"{outside:.2%} of the tokens lie outside the trainer's own set (medians over steps)."
    )


COMPARED = {
    "k3 of rollout engine and trainer": "mismatch.lag0.k3",
    "k3 of the heads in isolation": "head_isolated.k3",
    "the rollout head's distance from float64": "head_isolated.rollout_error",
}


def comparison(a: RunRecord, b: RunRecord, names: tuple[str, str], different: list[str]) -> str:
    """Two sentences about a pair: what is different, and what that did to mismatch and reward."""
    listed = ", ".join(different[:4]) + (f" and {len(different) - 4} more" if len(different) > 4 else "")
    first = f"{names[0]} and {names[1]} have the same configuration" if not different else f"They differ in {listed}"
    parts = []
    for of, path in COMPARED.items():
        x, y = (number_at(run.summary, path) for run in (a, b))
        if x is not None and y is not None:
            parts.append(f"{of} is {short(x)} in {names[0]} and {short(y)} in {names[1]}{_times(x, y, names)}")
    gains = [_gain(r) for r in (a, b)]
    if None not in gains:
        parts.append(f"the reward changed by {gains[0]:+.3f} and {gains[1]:+.3f}")
    return f"{first}. " + ("; ".join(parts) + "." if parts else "")


def _gain(run: RunRecord) -> float | None:
    """Reward of the last tenth minus reward of the first tenth."""
    first, last = run.summary["reward_first"], run.summary["reward_last"]
    return None if first is None else last - first


def _times(x: float, y: float, names: tuple[str, str]) -> str:
    if min(x, y) <= 0 or x == y:
        return ""
    ratio, lower = float(f"{max(x, y) / min(x, y):.2g}"), names[0] if x < y else names[1]
    return f", {short(ratio)} times lower in {lower}" if ratio > 1 else ""
