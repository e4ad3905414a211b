"""How often the drift monitor cries wolf, and how soon it sees one: simulated runs with fixed seeds.

benchmarks/drift.py measures the same on more runs.
"""

import warnings

import numpy as np
import pytest
from scipy.special import expit

from rlalign.calibration.calibrators import PlattCalibrator
from rlalign.calibration.drift import DriftMonitor, DriftState

PROMPTS, GROUP = 8, 8  # of a step: 64 rows


pytestmark = pytest.mark.slow


def responses(random, prompts, *, shift=0.0, slope=0.7) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `prompts` groups; prompts differ in a difficulty that the score does not see."""
    difficulty = np.repeat(random.normal(0, 1, prompts), GROUP)
    logits = random.normal(0, 2, prompts * GROUP)
    return logits, (random.random(len(logits)) < expit(slope * logits + difficulty - shift)).astype(float)


def states(seed, *, steps, every, moved_at=None, by_prompt=True, **moved) -> list[tuple[int, DriftState]]:
    """State at every report of one run, calibrated on 2000 labelled rows."""
    random = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monitor = DriftMonitor(PlattCalibrator().fit(*responses(random, 250)))
    found = []
    for step in range(steps):
        world = moved if moved_at is not None and step >= moved_at else {}
        clusters = step * PROMPTS + np.repeat(np.arange(PROMPTS), GROUP) if by_prompt else None
        monitor.update(*responses(random, PROMPTS, **world), step=step, clusters=clusters)
        if step % every == every - 1:
            found.append((step, monitor.report().state))
    return found


def first(found, state) -> int | None:
    return next((step for step, each in found if each is state), None)


def test_a_stationary_run_raises_no_drift():
    runs = [states(seed, steps=60, every=12) for seed in range(10)]
    assert not [run for run in runs if first(run, DriftState.drift) is not None]
    assert sum(first(run, DriftState.warn) is not None for run in runs) <= 3
    assert all(state is not DriftState.insufficient_data for run in runs for _, state in run)


def test_ignoring_that_responses_share_a_prompt_makes_alarms_of_noise():
    told, ignored = (
        sum(
            state is not DriftState.ok
            for seed in range(8)
            for _, state in states(seed, steps=50, every=10, by_prompt=by)
        )
        for by in (True, False)
    )
    assert ignored >= 3 * max(told, 1)


@pytest.mark.parametrize(("moved", "steps"), [({"shift": 2.0}, 4), ({"shift": 1.0}, 8), ({"slope": 0.0}, 6)])
def test_a_planted_change_is_seen_within(moved, steps):
    """shift 2, 1: E[p] - E[y] of 0.3, 0.16; slope: the score says nothing any more, while its mean stays right."""
    for seed in range(3):
        found = states(100 + seed, steps=36 + steps, every=2, moved_at=36, **moved)
        assert first([(step, state) for step, state in found if step < 36], DriftState.drift) is None
        assert found[-1][1] is DriftState.drift, (seed, found[-steps:])


def test_a_change_within_the_limits_is_no_drift():
    found = [states(seed, steps=60, every=10, moved_at=20, shift=0.15) for seed in range(6)]  # a gap of 0.025
    assert not [run for run in found if first(run, DriftState.drift) is not None]
