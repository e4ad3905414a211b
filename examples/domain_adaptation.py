"""A reward model on data it was not made for: a few labels move its scores, its weights stay.

python examples/domain_adaptation.py

The model was trained on sums of two digits, and is asked about sums of one. What was fitted at home misjudges it there; the same
two numbers fitted on 80 labelled answers of the new domain do better. Fitting is for the client until the numbers have settled,
which needs no restart (`CalibratedScorer.swap`); then the engine serves them.
"""

from __future__ import annotations

from dataclasses import dataclass

import addition
import numpy as np

from rlalign.calibration.calibrators import PlattCalibrator
from rlalign.calibration.metrics import expected_calibration_error, negative_log_likelihood
from rlalign.scoring import VLLMScorer, with_calibration

HOME, NEW = (10, 99), (1, 9)
LABELS = 80


@dataclass(frozen=True)
class Outcome:
    """Calibration error and negative log-likelihood (nats) in the new domain, with what was fitted at home and there.

    ids: the calibration that each of the two answers carried. difference: client against engine, largest.
    """

    ece_home: float
    ece_new: float
    nll_home: float
    nll_new: float
    ids: tuple[str, str]
    difference: float


def main() -> Outcome:
    model = addition.reward_model()
    raw = VLLMScorer.start(model, dtype="float32")
    home = fitted(raw, addition.answers(800, *HOME, seed=1))
    client = with_calibration(raw, home)
    held_out = addition.answers(1200, *NEW, seed=3)
    before, first = scores(client, held_out)
    client.swap(fitted(raw, addition.answers(LABELS, *NEW, seed=2)))
    after, second = scores(client, held_out)
    engine = VLLMScorer.start(model, dtype="float32", pooler_config=client.calibrator.to_vllm_pooler_config())
    outcome = Outcome(
        ece_home=expected_calibration_error(before, addition.labels(held_out)),
        ece_new=expected_calibration_error(after, addition.labels(held_out)),
        nll_home=negative_log_likelihood(before, addition.labels(held_out)),
        nll_new=negative_log_likelihood(after, addition.labels(held_out)),
        ids=(first, second),
        difference=float(np.abs(after - addition.served(engine, held_out)[:, 0]).max()),
    )
    print(
        f"calibration error in the new domain: {outcome.ece_home:.3f} as fitted at home, {outcome.ece_new:.3f} with {LABELS} labels"
    )
    print(f"negative log-likelihood: {outcome.nll_home:.3f} and {outcome.nll_new:.3f} nats")
    print(f"answers say who calibrated them: {', '.join(outcome.ids)}; client against engine {outcome.difference:.1e}")
    return outcome


def fitted(scorer: VLLMScorer, rows: list[addition.Answer]) -> PlattCalibrator:
    return PlattCalibrator().fit(addition.logits(scorer, rows), addition.labels(rows))


def scores(client, rows: list[addition.Answer]) -> tuple[np.ndarray, str]:
    """Calibrated probabilities [N], and the id of the one calibration behind them."""
    results = client.run([client.prepare(row.question, [row.text]) for row in rows])
    (name,) = {result.calibration_id for result in results}
    return np.array([result.rewards()[0] for result in results]), name


if __name__ == "__main__":
    main()
