"""Ranking causes: the same cause once, the strongest evidence first, and what an attribution's points mean."""

from types import SimpleNamespace

import pytest

from rlalign.diagnose.suspects import holding, layers, report
from rlalign.diagnose.suspects.ranking import merged
from rlalign.mismatch.causes import Cause


def test_a_cause_found_twice_is_listed_once_with_both_reasons():
    causes = [Cause("a", "weak", "x", 0.3), Cause("b", "some", "y", 0.6), Cause("a", "strong", "z", 0.9)]
    first, second = merged(causes)
    assert first == Cause("a", "strong; weak", "z", 0.9) and second.name == "b"
    assert merged([causes[0], causes[0]])[0].why == "weak"


def test_a_report_is_numbered_and_says_what_to_run():
    assert report([Cause("a", "why", "run this", 0.9)]) == "1. a (0.90): why\n   confirm: run this"


def attribution(*points):
    found = [SimpleNamespace(point=p, kind=p.split(".")[-1], layer=n, excess=x, over_floor=x > 3) for p, n, x in points]
    return SimpleNamespace(routes={"prefill": SimpleNamespace(route="prefill", points=found)})


def test_the_first_step_over_its_floor_leads():
    causes = layers.of_attribution(
        attribution(("layers.1.q", 1, 0.5), ("layers.1.mlp_norm", 1, 40.0), ("layers.2.gate", 2, 9e5), ("layers.3.up", 3, 9.0))
    )  # fmt: skip
    assert [(c.name, c.score) for c in causes] == [("norm epsilon", layers.FIRST), ("stale weights", layers.FURTHER)]
    assert "layers.1.mlp_norm is the first" in causes[0].why
    assert "in layer(s) 2, 3" in causes[1].why and "layers.2.gate, 9e+05 times" in causes[1].why


def test_steps_within_their_floor_are_no_cause():
    assert layers.of_attribution(attribution(("layers.1.q", 1, 2.9))) == []


@pytest.mark.parametrize(
    "names, text",
    [
        (["lm_head.weight"], "lm_head.weight"),
        ([f"model.layers.{i}.mlp.up_proj.weight" for i in range(12)], "layer(s) 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11"),
        (["model.norm.weight", *(f"model.layers.{i}.x" for i in (10, 2, 2, 3))], "layer(s) 2, 3, 10; model.norm.weight"),
    ],
)  # fmt: skip
def test_many_weights_are_summed_up_by_layer(names, text):
    assert holding._summary(names) == text


def test_frequencies_may_be_rounded_and_epsilons_may_not():
    exact = [10_000.0 ** (-j / 16) for j in range(16)]
    rounded = [f * (1 + 0.004 * (-1) ** j) for j, f in enumerate(exact)]
    other = [500_000.0 ** (-j / 16) for j in range(16)]
    assert holding._same(exact, rounded) and not holding._same(exact, other) and not holding._same(exact, exact[:8])
    assert holding._same([1e-6], [1e-6]) and not holding._same([1e-6], [1e-5])
    assert holding._theta(other) == "theta 5e+05"
