"""From metric rows to the numbers of a run: which statistic over steps stands for the whole is decided here alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

LAG0 = {
    "k1": "k1",
    "k3": "k3",
    "abs_mean": "abs_mean",
    "p50": "p50",
    "p99": "p99",
    "pearson": "pearson_prob",
    "ess": "ess",
}
HEAD_ALONE = ("k3", "abs_mean", "p99", "rollout_error", "trainer_error")
PHASES = ("rollout", "reward", "score", "train", "publish")  # of a step; others, such as wait, come after them


def phases_of(rows: Sequence[dict[str, float]]) -> list[str]:
    """The phases that any row has timed as time/PHASE_s, in the order of a step."""
    logged = {key[5:-2] for row in rows for key in row if key.startswith("time/") and key.endswith("_s")} - {"step"}
    return [phase for phase in PHASES if phase in logged] + sorted(logged - set(PHASES))


def column(rows: Sequence[dict[str, float]], key: str) -> list[float]:
    """The finite values of one metric in step order; rows without it are left out."""
    return [row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])]


def summarize(rows: Sequence[dict[str, float]]) -> dict[str, object]:
    """The part of summary.json that follows from metric rows. A metric that was never measured is None, not zero.

    reward_first, reward_last: mean of `reward/mean` over the first and last tenth of the steps (at least one step).
    eval_first, eval_last: first and last `eval/accuracy`.
    seconds: sum of `time/step_s`; tokens_per_s: all sampled tokens over those seconds, so training time counts.
    mismatch.lag0: median over steps; abs_max and k3_max: the worst step; nonfinite: tokens over all steps.
    head_isolated: median over steps, abs_max the worst. publishes: rows with a published version.
    rebuilds, repaired: sums over publishes.
    """
    reward, accuracy = column(rows, "reward/mean"), column(rows, "eval/accuracy")
    tenth = max(1, math.ceil(len(reward) / 10))
    tokens, seconds = _total(rows, "rollout/tokens"), _total(rows, "time/step_s")
    return {
        "steps": len(rows),
        "reward_first": fmean(reward[:tenth]) if reward else None,
        "reward_last": fmean(reward[-tenth:]) if reward else None,
        "eval_first": accuracy[0] if accuracy else None,
        "eval_last": accuracy[-1] if accuracy else None,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds if tokens and seconds else None,
        "mismatch": {
            "lag0": {
                **{name: _median(rows, f"mismatch/lag0/{key}") for name, key in LAG0.items()},
                "abs_max": _worst(rows, "mismatch/lag0/abs_max"),
                "k3_max": _worst(rows, "mismatch/lag0/k3"),
            },
            "nonfinite": _total(rows, "mismatch/nonfinite"),
        },
        "head_isolated": {
            **{name: _median(rows, f"head_isolated/{name}") for name in HEAD_ALONE},
            "abs_max": _worst(rows, "head_isolated/abs_max"),
        },
        "publishes": len(column(rows, "publish/version")),
        "publish_seconds": _median(rows, "publish/seconds"),
        "rebuilds": _total(rows, "publish/rebuilds"),
        "repaired": _total(rows, "publish/repaired"),
    }


def _median(rows: Sequence[dict[str, float]], key: str) -> float | None:
    values = column(rows, key)
    return median(values) if values else None


def _worst(rows: Sequence[dict[str, float]], key: str) -> float | None:
    return max(column(rows, key), default=None)


def _total(rows: Sequence[dict[str, float]], key: str) -> float | None:
    values = column(rows, key)
    return sum(values) if values else None
