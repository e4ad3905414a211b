"""A new version of a reward model behind the same threshold: each version brings its own two numbers.

python examples/normalise_two_model_versions.py

Raw scores of two versions live on different scales: "keep what scores above 2" keeps other things after an upgrade. Each version is
fitted on the same labelled answers and served with its own PoolerConfig, and "keep what is right with probability 0.8" keeps
meaning the same.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import addition
import numpy as np

from rlalign.calibration.calibrators import PlattCalibrator
from rlalign.scoring import HFScorer, VLLMScorer

RAW_THRESHOLD, PROBABILITY = 2.0, 0.8


@dataclass(frozen=True)
class Version:
    """kept_raw, kept: share of answers above the raw threshold, and above the probability. mean_p: mean served score.

    right: share of right answers among those kept by probability. difference: engine against client, largest.
    """

    kept_raw: float
    kept: float
    mean_p: float
    right: float
    difference: float


def main() -> tuple[Version, Version]:
    with tempfile.TemporaryDirectory() as folder:
        first = addition.reward_model()
        second = addition.trained(addition.answers(2000, 10, 99, seed=1), Path(folder), kinds=False, steps=250)
        versions = version("v1", first), version("v2", second)
    print(f"share kept by the same raw threshold: {versions[0].kept_raw:.2f} and {versions[1].kept_raw:.2f}")
    print(f"share kept by the same probability:   {versions[0].kept:.2f} and {versions[1].kept:.2f}")
    return versions


def version(name: str, model: Path) -> Version:
    """Fit, serve, measure."""
    plain = HFScorer(str(model))
    fitting, held_out = addition.answers(800, 10, 99, seed=2), addition.answers(1200, 10, 99, seed=3)
    calibrator = PlattCalibrator().fit(addition.logits(plain, fitting), addition.labels(fitting))
    engine = VLLMScorer.start(model, dtype="float32", pooler_config=calibrator.to_vllm_pooler_config())
    raw, found = addition.logits(plain, held_out)[:, 0], addition.served(engine, held_out)[:, 0]
    kept = found > PROBABILITY
    print(
        f"{name}: raw scores {raw.mean():+.2f} +- {raw.std():.2f}, served {found.mean():.2f}; of those above {PROBABILITY}, "
        f"{addition.labels(held_out)[kept].mean():.2f} are right"
    )
    return Version(
        kept_raw=float((raw > RAW_THRESHOLD).mean()),
        kept=float(kept.mean()),
        mean_p=float(found.mean()),
        right=float(addition.labels(held_out)[kept].mean()),
        difference=float(np.abs(calibrator.transform(raw) - found).max()),
    )


if __name__ == "__main__":
    main()
