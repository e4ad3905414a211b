"""results/adaptive.md and its plots, from what benchmarks/adaptive.py measured. N judged tokens or answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import adaptive_plots as plots
import numpy as np
import torch
from adaptive_data import FAMILIES
from adaptive_methods import BASELINES, Judged

from rlalign.calibration.metrics import (
    auroc,
    bootstrap_ci,
    brier_score,
    ece_noise_floor,
    expected_calibration_error,
    negative_log_likelihood,
)
from rlalign.tracking.environment import cpu_model

if TYPE_CHECKING:
    from adaptive import Data

RESAMPLES = 200
DEFAULT = "ATS transformer"  # what AdaptiveTemperature() is; not the best of the rows
ece = expected_calibration_error


def write(folder: Path, tables: dict[str, dict], data: Data, *, sizes: dict[str, int], seconds: float) -> None:
    """The page and the plots."""
    families = list(FAMILIES)
    mixed, trained = data.part("test", families), data.part("test", ["addition"])
    of_N = data.family_of(mixed)
    goal = verdict(tables["mixed"], mixed.prompt_N, of_N)
    home = verdict(tables["trained"], trained.prompt_N, np.array(["addition"] * len(trained.prompt_N)))
    text = TEXT.format(
        machine=cpu_model(), torch=torch.__version__, seconds=seconds, **sizes, tokens=len(of_N), problems=len(mixed.prompts),
        families=", ".join(f"{name} ({FAMILIES[name][0]})" for name in families),
        mixed_verdict=goal, mixed=method_table(tables["mixed"], mixed.prompt_N, of_N),
        trained_verdict=home, trained=method_table(tables["trained"], trained.prompt_N, None),
        losses=loss_table(tables["losses"], mixed.prompt_N, of_N), answers=answer_table(tables["answers"]),
        domains=domain_tables(tables["domains"]),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adaptive.md").write_text(text)
    plots.reliability(folder / "adaptive_reliability.png", tables["mixed"])
    plots.families(folder / "adaptive_families.png", tables["mixed"], of_N)
    plots.domains(folder / "adaptive_domains.png", tables["domains"])
    print(f"{folder / 'adaptive.md'}\n{goal}\n{home}")


def method_table(rows: dict[str, list[Judged]], prompt_N: np.ndarray, of_N: np.ndarray | None) -> str:
    """One line per method; several seeds are averaged, with the range of their ECE."""
    inside = "" if of_N is None else " ECE within a family |"
    lines = [
        f"| method | ECE [95 %] |{inside} Brier [95 %] | NLL | AUROC | accuracy | token NLL |",
        "|---|--:|" + ("" if of_N is None else "--:|") + "--:|--:|--:|--:|--:|",
    ]
    floor = ece_noise_floor(next(iter(rows.values()))[0].top_N).p95
    for name, seeds in rows.items():
        first = seeds[0]
        each = [ece(s.top_N, s.right_N) for s in seeds]
        spread = f", seeds {min(each):.3f} to {max(each):.3f}" if len(seeds) > 1 else ""
        within = "" if of_N is None else f" {average(seeds, lambda s: within_families(s, of_N)):.3f} |"
        lines.append(
            f"| {name} | {np.mean(each):.4f} {interval(ece, first, prompt_N)}{spread} |{within} "
            f"{average(seeds, lambda s: brier_score(s.top_N, s.right_N)):.4f} {interval(brier_score, first, prompt_N)} | "
            f"{average(seeds, top_nll):.3f} | {average(seeds, lambda s: auroc(s.top_N, s.right_N)):.3f} | "
            f"{first.right_N.mean():.4f} | {'-' if first.target_N is None else f'{average(seeds, target_nll):.3f}'} |"
        )
    return "\n".join([*lines, "", f"Perfect calibration shows an ECE of up to {floor:.4f} here by chance (95 %)."])


def verdict(rows: dict[str, list[Judged]], prompt_N: np.ndarray, of_N: np.ndarray) -> str:
    """The default head against the best of the others, by ECE over everything, within families, and by Brier score."""
    measures = {
        "ECE": lambda j, i: ece(j.top_N[i], j.right_N[i]),
        "Brier": lambda j, i: brier_score(j.top_N[i], j.right_N[i]),
    }
    if len(set(of_N)) > 1:
        measures["ECE within a family"] = lambda j, i: within(j.top_N[i], j.right_N[i], of_N[i])
    return "\n".join(f"- {what}: {against_the_best(rows, measure, prompt_N)}" for what, measure in measures.items())


def against_the_best(
    rows: dict[str, list[Judged]], measure: Callable[[Judged, np.ndarray], float], prompt_N: np.ndarray
) -> str:
    """The default head, the best baseline, and the change from the one to the other."""
    ours, everything = rows[DEFAULT], np.arange(len(prompt_N))
    others = {name: measure(rows[name][0], everything) for name in BASELINES}
    other = min(others, key=others.get)
    mine = average(ours, lambda j: measure(j, everything))
    low, high = paired(lambda i: measure(ours[0], i) / measure(rows[other][0], i) - 1, prompt_N)
    return (
        f"{DEFAULT} {mine:.4f}, the best of the others ({other}) {others[other]:.4f}: "
        f"{mine / others[other] - 1:+.0%} (95 %: {low:+.0%} to {high:+.0%})"
    )


def paired(change: Callable[[np.ndarray], float], prompt_N: np.ndarray) -> tuple[float, float]:
    """95 % of a comparison of two methods when prompts are resampled, both on the same draw."""
    random = np.random.default_rng(0)
    members = np.split(np.arange(len(prompt_N)), np.flatnonzero(np.diff(prompt_N)) + 1)
    drawn = [
        change(np.concatenate([members[i] for i in random.integers(len(members), size=len(members))]))
        for _ in range(RESAMPLES)
    ]
    return tuple(np.quantile(drawn, [0.025, 0.975]))


def within(top_N: np.ndarray, right_N: np.ndarray, of_N: np.ndarray | None) -> float:
    """ECE, or its mean over families."""
    if of_N is None:
        return ece(top_N, right_N)
    return float(np.mean([ece(top_N[of_N == f], right_N[of_N == f]) for f in sorted(set(of_N))]))


def within_families(judged: Judged, of_N: np.ndarray) -> float:
    """The mean over families of the ECE of that family's tokens."""
    return within(judged.top_N, judged.right_N, of_N)


def loss_table(rows: dict[str, dict[str, Judged]], prompt_N: np.ndarray, of_N: np.ndarray) -> str:
    """Head and loss."""
    lines = ["| head | loss | ECE [95 %] | ECE within a family | Brier | NLL | mean confidence where wrong | token NLL |",
             "|---|---|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    for head, losses in rows.items():
        for name, j in losses.items():
            lines.append(
                f"| {head} | {name} | {ece(j.top_N, j.right_N):.4f} {interval(ece, j, prompt_N)} | "
                f"{within_families(j, of_N):.3f} | {brier_score(j.top_N, j.right_N):.4f} | {top_nll(j):.3f} | "
                f"{j.top_N[~j.right_N].mean():.3f} | {target_nll(j):.3f} |"
            )
    return "\n".join(lines)


def answer_table(rows: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """Whole answers."""
    lines = ["| confidence of an answer | ECE [95 %] | Brier | NLL | AUROC |", "|---|--:|--:|--:|--:|"]
    for name, (p_B, right_B) in rows.items():
        j = Judged(top_N=np.clip(p_B, 0, 1), right_N=right_B, target_N=None)
        lines.append(
            f"| {name} | {ece(j.top_N, right_B):.4f} {interval(ece, j, np.arange(len(p_B)))} | "
            f"{brier_score(j.top_N, right_B):.4f} | {top_nll(j):.3f} | {auroc(p_B, right_B):.3f} |"
        )
    right_B = next(iter(rows.values()))[1]
    return "\n".join([*lines, "", f"{len(right_B)} greedy answers, {right_B.mean():.1%} of them right."])


def domain_tables(rows: dict[str, dict[tuple[str, str], Judged]]) -> str:
    """Per method, the ECE where it was fitted and elsewhere; then the cells of the best."""
    lines = ["| method | ECE where fitted | ECE on other families | Brier where fitted | Brier on others |",
             "|---|--:|--:|--:|--:|"]  # fmt: skip
    for name, cells in rows.items():
        lines.append(f"| {name} | " + " | ".join(
            f"{np.mean([measure(j.top_N, j.right_N) for (a, b), j in cells.items() if (a == b) == here]):.3f}"
            for measure in (ece, brier_score) for here in (True, False)) + " |")  # fmt: skip
    for name, cells in rows.items():
        lines += ["", f"ECE of {name}, fitted on the row's family, judged on the column's:", "",
                  "| | " + " | ".join(FAMILIES) + " |", "|---|" + "--:|" * len(FAMILIES)]  # fmt: skip
        for a in FAMILIES:
            lines.append(
                f"| {a} | " + " | ".join(f"{ece(cells[a, b].top_N, cells[a, b].right_N):.3f}" for b in FAMILIES) + " |"
            )
    return "\n".join(lines)


def average(seeds: list[Judged], measure: Callable[[Judged], float]) -> float:
    """Over seeds."""
    return float(np.mean([measure(s) for s in seeds]))


def top_nll(j: Judged) -> float:
    """Log loss of right, probabilities held 1e-7 inside (0, 1)."""
    return negative_log_likelihood(np.clip(j.top_N, 1e-7, 1 - 1e-7), j.right_N)


def target_nll(j: Judged) -> float:
    """-log p of the reference's token, nats."""
    return float(-np.log(np.maximum(j.target_N, 1e-30)).mean())


def interval(metric: Callable, j: Judged, cluster_N: np.ndarray) -> str:
    """95 %, prompts resampled."""
    found = bootstrap_ci(metric, j.top_N, j.right_N, cluster=cluster_N, n_resamples=RESAMPLES, method="basic")
    return f"[{max(found.low, 0):.4f}, {found.high:.4f}]"


TEXT = """# Adaptive temperature scaling on an overconfident policy

`python benchmarks/adaptive.py`, {machine}, 1 thread, torch {torch}; {seconds:.0f} s in all, the policy's training included when
its folder was not there. The protocol is that of arXiv 2409.19817 at a small scale: a policy is made overconfident by
RL, calibrations are fitted on teacher-forced tokens of reference answers and judged on other problems.

The policy is the tiny two-digit addition policy after 120 steps of GRPO on 512 problems. Families of problems:
{families}. Each gives {fit} problems to fit on, {validation} to validate on and {test} to judge on; baselines are fitted
on the first two together. ECE has 15 equal-width bins; intervals resample prompts and are basic ones (the
percentiles reflected about the value: resamples of a binned ECE lie above it), so that one can end below its number.
Confidence is the probability of the most likely token, right when that is the reference's.
ATS rows with our loss average three seeds of the head where a range is given.

## Where miscalibration depends on context: {problems} problems of all families, {tokens} tokens

The default head, mean of its seeds (interval: seed 0, prompts resampled):

{mixed_verdict}

![reliability](adaptive_reliability.png)

{mixed}

"ECE within a family" is the mean over families of the ECE of one family's tokens: what remains of the promise once the
kind of problem is known. A curve over the confidence alone cannot be right in two families that need different curves.

![families](adaptive_families.png)

## Where it does not: the problems that GRPO trained on (two-digit addition, unseen ones)

{trained_verdict}

{trained}

## Losses, on problems of all families

{losses}

## Whole answers, written greedily, judged by the verifier

{answers}

## Out of domain: fitted on one family, judged on the others

{domains}

![domains](adaptive_domains.png)
"""
