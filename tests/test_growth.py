"""What a k3 follows: a planted leader is named with its lead, two trends alone are not, and the numbers are SciPy's."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoConfig, AutoModelForCausalLM

from rlalign.diagnose.families.family_table import RECIPES
from rlalign.mismatch.causes import follows
from rlalign.report.run_page import growth
from rlalign.run.observation import traced
from rlalign.types import LogprobSpec, Rollout, collate


def walk(seed, rows=60):
    return torch.randn(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(0)


def test_a_leader_is_named_with_its_lead_and_unrelated_walks_are_not():
    leader, others = walk(1), {f"walk{i}": walk(20 + i).tolist() for i in range(6)}
    k3 = torch.cat([leader[:1].expand(3), leader[:-3]]).exp()  # three rows later
    first, *rest = follows(k3.tolist(), {"leader": leader.tolist()} | others)
    assert (first.name, first.lead) == ("leader", 3) and first.changes > 0.9 and first.beyond_chance
    assert not any(f.beyond_chance for f in rest)
    fallen = follows(k3.tolist(), {"mirror": (-leader).tolist()})[0]
    assert fallen.lead == 3 and fallen.changes < -0.9


def test_two_trends_go_together_in_levels_and_not_in_changes():
    rows = torch.arange(60, dtype=torch.float64)
    noise = [torch.rand(60, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (3, 4)]
    (found,) = follows((0.1 * rows + noise[0]).exp().tolist(), {"norm": (2 * rows + noise[1]).tolist()})
    assert found.levels > 0.98 and not found.beyond_chance


def test_correlations_are_scipys_ties_included():
    k3, series = walk(1, 30).exp(), walk(2, 30).round()
    (found,) = follows(k3.tolist(), {"rounded": series.tolist()})
    lead = found.lead
    assert found.changes == pytest.approx(spearmanr(series.diff()[: 29 - lead], k3.log().diff()[lead:])[0])
    assert found.levels == pytest.approx(spearmanr(series[: 30 - lead], k3[lead:])[0])


@pytest.mark.slow
def test_chance_is_the_luckiest_of_all_series():
    """Of unrelated walks one in twenty is beyond chance, however many series there are."""
    lucky = 0
    for trial in range(40):
        series = {f"{i}": walk(1000 + 50 * trial + i, 24).tolist() for i in range(12)}
        lucky += any(f.beyond_chance for f in follows(walk(trial, 24).exp().tolist(), series, seed=trial))
    assert lucky <= 8


@pytest.mark.slow
def test_noise_around_a_level_is_not_beyond_chance_either():
    """Its changes swing back by themselves, on both sides: shuffled changes alone would call one in five beyond chance."""
    lucky = 0
    for trial in range(60):
        rows_KT = torch.randn(9, 30, generator=torch.Generator().manual_seed(trial), dtype=torch.float64)
        series = {f"{i}": row.tolist() for i, row in enumerate(rows_KT[1:])}
        lucky += any(f.beyond_chance for f in follows(rows_KT[0].exp().tolist(), series, seed=trial))
    assert lucky <= 8


def test_too_few_rows_constants_and_gaps():
    assert follows([1.0] * 5, {"a": [1.0, 2.0, 3.0, 4.0, 5.0]}) == []
    assert follows(walk(1).tolist(), {"constant": [2.0] * 60}) == []
    with pytest.raises(ValueError, match="a has 3 rows"):
        follows([1.0, 2.0], {"a": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match="must be finite"):
        follows([1.0, float("nan")], {"a": [1.0, 2.0]})


def test_what_is_traced_are_the_norms_and_logits_of_the_weights_as_they_are():
    recipe = RECIPES["qwen3"]
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(recipe.model_type, **recipe.arguments()), dtype=torch.float32
    )
    ids = torch.randint(3, 250, (9,)).tolist()
    rollout = Rollout(
        token_ids=ids, loss_mask=[False] * 4 + [True] * 5, rollout_logprobs=[0.0] * 9, prompt_id=0, group_id=0,
        finish_reason="stop", version_spans=[(4, 9, 0)],
    )  # fmt: skip
    batch = collate([rollout], pad_token_id=0, spec=LogprobSpec())
    old_BL = torch.tensor([[0.0] * 4 + [-9.0, -5.0, -1.0, -0.1, -0.1]])
    policy = SimpleNamespace(
        named_weights=network.named_parameters, network=network, whole_head=nullcontext,
        hidden_states=lambda b: network.model(b.token_ids_BL).last_hidden_state.detach(),
    )  # fmt: skip
    found = traced(policy, SimpleNamespace(batch=batch, old_logprobs_BL=old_BL), 2)
    with torch.no_grad():
        logits_NV = network(batch.token_ids_BL).logits[0, 3:8].double()
    assert found["trace/unlikely"] == pytest.approx(2 / 5)
    assert found["trace/logit_std"] == pytest.approx(float(logits_NV.std(1).mean()), rel=1e-4)
    assert found["trace/logit_max"] == pytest.approx(float(logits_NV.amax(1).mean()), rel=1e-4)
    whole = torch.cat([p.detach().double().flatten() for p in network.parameters()]).norm()
    norms = {name.rpartition("/")[2]: value for name, value in found.items() if "/norm/" in name}
    assert norms.keys() == {"layer00", "layer01", "rest"}
    assert sum(v**2 for v in norms.values()) ** 0.5 == pytest.approx(float(whole))
    one = torch.cat([p.detach().double().flatten() for p in network.model.layers[1].parameters()]).norm()
    assert norms["layer01"] == pytest.approx(float(one))


def test_the_report_says_what_a_traced_k3_follows():
    leader = walk(1, 40)
    rows = tuple(
        {"step": t, "mismatch/lag0/k3": float(leader[max(t - 1, 0)].exp()), "train/entropy": float(other)}
        | {"trace/logit_std": float(leader[t])}
        for t, other in enumerate(walk(23, 40))
    )
    (first, *_) = growth(SimpleNamespace(metrics=SimpleNamespace(rows=rows)))
    assert (first.name, first.lead) == ("trace/logit_std", 1) and first.beyond_chance
    bare = tuple({k: v for k, v in row.items() if k != "trace/logit_std"} for row in rows)
    assert growth(SimpleNamespace(metrics=SimpleNamespace(rows=bare))) == []
