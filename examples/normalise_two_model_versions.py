"""A new version of a reward model behind the same threshold: each version brings its own two numbers.

python examples/normalise_two_model_versions.py

Raw scores of two versions live on different scales: a threshold that meant "right with probability 0.8" for one means something
else after an upgrade. Each version is fitted on the same labelled answers and served with its own PoolerConfig, and the threshold
on its probabilities keeps its meaning. How many answers lie above it may change: a version that tells more apart is sure of
more.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import addition
import numpy as np

from rlalign.calibration.calibrators import PlattCalibrator
from rlalign.scoring import HFScorer, VLLMScorer

PROBABILITY = 0.8


@dataclass(frozen=True)
class Version:
    """threshold: the raw score at which this version says PROBABILITY. mean_p: mean served score.

    right: share of right answers among those kept by probability; right_raw: among those kept by the first version's raw threshold.
    difference: engine against client, largest.
    """

    threshold: float
    mean_p: float
    right_raw: float
    right: float
    difference: float


def main() -> tuple[Version, Version]:
    with tempfile.TemporaryDirectory() as folder:
        first = addition.reward_model()
        second = addition.trained(addition.answers(2000, 10, 99, seed=1), Path(folder), kinds=False, steps=250)
        old = version("v1", first)
        new = version("v2", second, raw_threshold=old.threshold)
    print(f"the raw score {old.threshold:+.2f} said {PROBABILITY} in v1; v2 says {PROBABILITY} at {new.threshold:+.2f}")
    print(f"right among what v1's raw threshold keeps: {old.right_raw:.2f} in v1, {new.right_raw:.2f} in v2")
    print(f"right among what the probability keeps:    {old.right:.2f} in v1, {new.right:.2f} in v2")
    return old, new


def version(name: str, model: Path, *, raw_threshold: float | None = None) -> Version:
    """Fit, serve, measure. raw_threshold: None: where this version says PROBABILITY."""
    plain = HFScorer(str(model))
    fitting, held_out = addition.answers(800, 10, 99, seed=2), addition.answers(1200, 10, 99, seed=3)
    calibrator = PlattCalibrator().fit(addition.logits(plain, fitting), addition.labels(fitting))
    engine = VLLMScorer.start(model, dtype="float32", pooler_config=calibrator.to_vllm_pooler_config())
    raw, found = addition.logits(plain, held_out)[:, 0], addition.served(engine, held_out)[:, 0]
    right = addition.labels(held_out)
    own = calibrator.bias_ + math.log(PROBABILITY / (1 - PROBABILITY)) / calibrator.scale_
    print(
        f"{name}: raw scores {raw.mean():+.2f} +- {raw.std():.2f}, served {found.mean():.2f}, right {right.mean():.2f}"
    )
    return Version(
        threshold=own,
        mean_p=float(found.mean()),
        right_raw=float(right[raw > (own if raw_threshold is None else raw_threshold)].mean()),
        right=float(right[found > PROBABILITY].mean()),
        difference=float(np.abs(calibrator.transform(raw) - found).max()),
    )


if __name__ == "__main__":
    main()
