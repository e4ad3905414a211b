"""How often the drift monitor cries wolf and how soon it sees a wolf, on simulated runs whose truth is known."""

from __future__ import annotations

import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import median

import numpy as np
from scipy.special import expit

from rlalign.calibration.calibrators import PlattCalibrator
from rlalign.calibration.drift import DriftMonitor, DriftState

STEPS, MOVED_AT, PROMPTS, GROUP = 120, 60, 8, 8  # 64 labelled rows a step


@dataclass(frozen=True, kw_only=True)
class World:
    """P(right) = sigmoid(slope * logit + difficulty of the prompt - shift); after `MOVED_AT` with the moved values.

    fit_prompts: prompts of GROUP rows that the calibration is fitted on. spread: of the difficulty, which the score does
    not see. clusters: the monitor is told which rows share a prompt. pick: labels are only taken from the higher scores with
    this preference, and weighted back (or not, with weighted=False).
    """

    fit_prompts: int = 250
    spread: float = 1.0
    clusters: bool = True
    shift: float = 0.0
    slope: float = 0.7
    pick: float = 0.0
    weighted: bool = True


STATIONARY = {
    "independent rows, calibrated on 20,000": World(fit_prompts=2500, spread=0.0),
    "8 rows a prompt, calibrated on 2,000": World(),
    "8 rows a prompt, calibrated on 400": World(fit_prompts=50),
    "labels picked by score, weighted back": World(pick=1.0),
    "*the same, the monitor not told of prompts*": World(clusters=False),
    "*labels picked by score, not weighted back*": World(pick=1.0, weighted=False),
}
MOVED = {
    "success falls, E[p] - E[y] = 0.04 (within the limit)": World(shift=0.25),
    "success falls, 0.08": World(shift=0.5),
    "success falls, 0.16": World(shift=1.0),
    "success falls, 0.30": World(shift=2.0),
    "scores say half as much": World(slope=0.35),
    "scores say nothing, mean unchanged": World(slope=0.0),
}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Of one run: the states before the change, and the steps from there to the first warn and drift."""

    warned: bool
    drifted: bool
    warn_delay: int | None
    drift_delay: int | None


def responses(
    random: np.random.Generator, prompts: int, world: World, *, moved: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, labels and prompt of every row."""
    prompt = np.repeat(np.arange(prompts), GROUP)
    logits = random.normal(0, 2, len(prompt))
    slope, shift = (world.slope, world.shift) if moved else (0.7, 0.0)
    chance = expit(slope * logits + random.normal(0, world.spread, prompts)[prompt] - shift)
    return logits, (random.random(len(prompt)) < chance).astype(float), prompt


def simulate(seed: int, world: World, *, change: bool) -> Seen:
    """One run with a report every 10 steps; after a change at every step, and from the tenth on at every fifth."""
    random = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monitor = DriftMonitor(PlattCalibrator().fit(*responses(random, world.fit_prompts, world, moved=False)[:2]))
    states: list[tuple[int, DriftState]] = []
    for step in range(STEPS):
        logits, labels, prompt = responses(random, PROMPTS, world, moved=change and step >= MOVED_AT)
        chance = 0.1 + 0.9 * expit(world.pick * 2 * logits) if world.pick else np.ones(len(logits))
        picked = random.random(len(logits)) < chance
        monitor.update(
            logits[picked], labels[picked], step=step,
            weight=1 / chance[picked] if world.weighted else None,
            clusters=step * PROMPTS + prompt[picked] if world.clusters else None,
        )  # fmt: skip
        if step % (10 if not change or step < MOVED_AT else 1 if step < MOVED_AT + 10 else 5) == 0 and step > 9:
            states.append((step, monitor.report().state))
            if change and states[-1] == (step, DriftState.drift) and step >= MOVED_AT:
                break
    before = {state for step, state in states if step < MOVED_AT or not change}
    after = [(step - MOVED_AT + 1, state) for step, state in states if change and step >= MOVED_AT]
    return Seen(
        warned=DriftState.warn in before or DriftState.drift in before,
        drifted=DriftState.drift in before,
        warn_delay=next((delay for delay, state in after if state is not DriftState.ok), None),
        drift_delay=next((delay for delay, state in after if state is DriftState.drift), None),
    )


def still_row(name: str, runs: int) -> str:
    """How often a stationary world raised an alarm."""
    seen = [simulate(seed, STATIONARY[name], change=False) for seed in range(runs)]
    return f"| {name} | {sum(s.drifted for s in seen)} of {runs} | {sum(s.warned for s in seen)} of {runs} |"


def moved_row(name: str, runs: int) -> str:
    """How soon a change was seen."""
    seen = [simulate(seed, MOVED[name], change=True) for seed in range(runs)]
    drift = [s.drift_delay for s in seen if s.drift_delay is not None]
    warn = [s.warn_delay for s in seen if s.warn_delay is not None]
    shown = f"{median(warn):.0f}" if warn else "-", f"{median(drift):.0f}, {max(drift)}" if drift else "-"
    return f"| {name} | {len(drift)} of {runs} | {shown[0]} | {shown[1]} |"


def tables(runs: int, *, processes: int) -> str:
    """The two tables as Markdown; half as many runs for changes."""
    with ProcessPoolExecutor(processes) as pool:
        still = list(pool.map(still_row, STATIONARY, [runs] * len(STATIONARY)))
        moved = list(pool.map(moved_row, MOVED, [runs // 2] * len(MOVED)))
    return "\n".join([*HEADS[0], *still, "", *HEADS[1], *moved])


HEADS = (
    ("| stationary world | runs with a `drift` | runs with at least a `warn` |", "|---|--:|--:|"),
    (
        "| what changes at one step | `drift` seen in | steps to `warn` (median) | steps to `drift` (median, slowest) |",
        "|---|--:|--:|--:|",
    ),
)
