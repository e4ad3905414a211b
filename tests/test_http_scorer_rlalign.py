"""HTTPScorer against a real `rlalign serve`: the numbers of the scorer behind it, for every kind of model."""

from __future__ import annotations

import asyncio
import json

import httpx
import numpy as np
import pytest
import torch

from rlalign.calibration.calibrators import PlattCalibrator
from rlalign.scoring import HTTPScorer, ScoringParams, with_calibration
from rlalign.scoring.calibrated import identity_of
from tests.reward_models import scorer_of
from tests.reward_serving import serving

QUERY, ITEMS = "What is 2 + 2? ", ["4", "5, I would say", "four", "?"]
JUDGE = {"label_token_ids": [60, 61], "min_label_mass": 0.0}


def platt(seed=0):
    x = np.linspace(-3, 3, 200)
    return PlattCalibrator().fit(x, (x + np.sin(31 * x + seed) > 0.2).astype(int))


@pytest.mark.parametrize("kind", ["one_label", "three_labels", "judge", "bert", "process"])
def test_the_same_numbers_as_the_scorer_behind_it(kind):
    theirs = scorer_of(kind)
    params = ScoringParams(**(JUDGE if kind == "judge" else {}))
    with serving(theirs) as url:
        ours = HTTPScorer(url)
        assert ours.dialect == "sglang"
        assert ours.info.num_labels == theirs.info.num_labels and ours.info.tasks == theirs.info.tasks
        a, b = (scorer.score(QUERY, ITEMS, params) for scorer in (ours, theirs))
        c = asyncio.run(ours.ascore(QUERY, ITEMS, params))
        ids = [scorer.score([5, 6], [[7], [8, 9]], params) for scorer in (ours, theirs)]
        ours.close()
    for found, want in ((a, b), (c, b), ids):
        assert found.errors == want.errors == [None] * len(want)
        for x, y in zip([*found.logits, *found.scores], [*want.logits, *want.scores], strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)


def test_states_and_refusals_come_from_the_model_behind_it():
    asked = ScoringParams(return_pooled_hidden_states=True)
    with serving(scorer_of("three_labels")) as url:
        ours = HTTPScorer(url)
        found, want = ours.score(QUERY, ITEMS, asked), scorer_of("three_labels").score(QUERY, ITEMS, asked)
        ours.close()
    for a, b in zip(found.pooled_hidden_states, want.pooled_hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    with serving(scorer_of("bert")) as url:
        ours = HTTPScorer(url)
        with pytest.raises(ValueError, match="cross-encoder"):
            ours.score(QUERY, ITEMS, asked)
        ours.close()


def test_a_calibration_there_and_one_here_do_not_add_up(tmp_path):
    """The server's is switched off in every request, so the client's own is the only one."""
    plain = scorer_of("one_label")
    here, there = platt(), platt(seed=2)
    there.save(tmp_path / "calibration.json", model=identity_of(plain.info))
    with serving(plain) as url:
        put = httpx.put(f"{url}/v1/calibration", json=json.loads((tmp_path / "calibration.json").read_text()))
        assert put.status_code == 200, put.text
        activated = httpx.post(f"{url}/v1/score", json={"query": QUERY, "items": ITEMS}).json()
        ours = with_calibration(HTTPScorer(url), here)
        result = ours.score(QUERY, ITEMS)
    raw = np.concatenate(plain.score(QUERY, ITEMS).logits)
    assert activated["calibration_id"] == there.calibration_id
    assert result.rewards() == pytest.approx(here.transform(raw).tolist(), abs=1e-5)
    assert result.calibration_id == here.calibration_id != there.calibration_id
