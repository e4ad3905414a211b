"""The examples, run as they are: what each of them claims, checked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    """A script's module. Their engines live until this file is done."""
    import importlib

    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))


def test_every_example_is_run_here():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {
        "addition", "calibrated_reranker", "temperature_scaling", "normalise_two_model_versions", "domain_adaptation", "own_loop"
    }  # fmt: skip


def test_a_reranker_with_calibrated_scores(example):
    found = example("calibrated_reranker").main()
    assert found.ece_served < found.ece_plain
    assert found.reordered == 0  # probabilities rank as logits do
    assert found.difference < 1e-4
    assert "already" in found.refusal


def test_temperature_scaling(example):
    found = example("temperature_scaling").main()
    assert found.temperature > 1.5 and found.sure_plain - found.accuracy > 0.15  # it was overconfident
    assert found.ece_served < found.ece_plain / 2
    assert found.moved == 0
    assert found.difference < 1e-4


def test_two_model_versions_on_one_scale(example):
    first, second = example("normalise_two_model_versions").main()
    assert abs(first.mean_p - second.mean_p) < 0.05  # both say how many answers are right
    assert first.right_raw == pytest.approx(first.right, abs=0.01)  # its own threshold keeps what its probability keeps
    for version in (first, second):
        assert version.right > 0.8 - 0.05  # of answers kept at probability 0.8
        assert version.difference < 1e-4


def test_domain_adaptation_with_a_few_labels(example):
    found = example("domain_adaptation").main()
    assert found.nll_new < found.nll_home and found.ece_new < found.ece_home
    assert found.ids[0] != found.ids[1]
    assert found.difference < 1e-4
