"""The trainer's side of attribution: what hooks see and replace, and what wide arithmetic is; a second model plays rollout."""

import pytest
import torch
from torch import nn

from rlalign.diagnose.attribution import trainer_side
from rlalign.diagnose.attribution.findings import counted, differences
from rlalign.diagnose.attribution.trainer_side import Side, Widened, visited
from rlalign.diagnose.both_sides import head_logprobs, hidden_states
from rlalign.trainer.head_mirror import mirror
from tests import attribution_parts as parts


def side_of(network: nn.Module, rows: int = 0) -> Side:
    mirror(network, head_dtype="float32", chunk=0)
    return Side(network, parts.mapping(network), rows)


def worst(one, other, point, batch):
    width = one.width(point)
    return float(differences(one, other, point, counted(one, other, point, batch), width=width).relative_N.max())


@pytest.fixture(scope="module")
def batch():
    return parts.batch()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_points_hold_what_the_formulas_say(tmp_path, batch, attention):
    """The recorded activations follow from each other and the weights, computed here without the model's code."""
    network = parts.model(attn_implementation=attention)
    network.set_attn_implementation(attention)
    side = side_of(network)
    found = trainer_side.record(side, batch, tmp_path)
    layer, count = network.model.layers[1], range(int(batch.attention_mask_BL.sum()))

    def at(point, index=1):
        return found.read(f"layers.{index}.{point}", count, width=found.width(f"layers.{index}.{point}")).double()

    def norm(x, module):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon) * module.weight.double()

    def linear(x, module):
        return x @ module.weight.double().T

    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(at("input_norm"), norm(at("residual", 0), layer.input_layernorm), **close)
    torch.testing.assert_close(at("v"), linear(at("input_norm"), layer.self_attn.v_proj), **close)
    heads = norm(at("q").view(-1, 4, 8), layer.self_attn.q_norm).flatten(1)
    torch.testing.assert_close(at("q_norm"), heads, **close)
    torch.testing.assert_close(at("q_rope").view(-1, 4, 8).norm(dim=2), heads.view(-1, 4, 8).norm(dim=2), **close)
    torch.testing.assert_close(at("attn_out"), linear(at("attention"), layer.self_attn.o_proj), **close)
    torch.testing.assert_close(at("mid_residual"), at("residual", 0) + at("attn_out"), **close)
    gated = nn.functional.silu(at("gate")) * at("up")
    torch.testing.assert_close(at("activation"), gated, **close)
    torch.testing.assert_close(at("residual"), at("mid_residual") + at("mlp_out"), **close)
    final = found.read("final_norm", count, width=32).double()
    torch.testing.assert_close(found.read("logits", count, width=97).double(), linear(final, network.lm_head), **close)


def test_watching_changes_nothing_and_leaves_nothing_behind(tmp_path, batch):
    network = parts.model()
    before = network(input_ids=batch.token_ids_BL, attention_mask=batch.attention_mask_BL).logits
    trainer_side.record(side_of(network), batch, tmp_path)
    network.lm_head.__dict__.pop("forward")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert torch.equal(before, network(input_ids=batch.token_ids_BL, attention_mask=batch.attention_mask_BL).logits)
    again = trainer_side.record(side_of(network), batch, tmp_path / "again")
    mine = trainer_side.record(side_of(network), batch, tmp_path / "mine", inputs=again)
    assert all(worst(mine, again, p, batch) == 0.0 for p in mine.points), "its own activations in its own place"


def test_an_isolated_fault_shows_in_its_own_step_only(tmp_path, batch):
    """One wrong epsilon: every later activation differs, but given the other side's inputs only that norm does."""
    rollout = parts.model()
    rollout.model.layers[1].post_attention_layernorm.variance_epsilon = 0.5
    theirs = trainer_side.record(side_of(rollout), batch, tmp_path / "rollout")
    side = side_of(parts.model())
    own = trainer_side.record(side, batch, tmp_path / "own")
    isolated = trainer_side.record(side, batch, tmp_path / "isolated", inputs=theirs)
    differing = [p for p in own.points if worst(own, theirs, p, batch) > 1e-5]
    assert {"layers.1.mlp_norm", "layers.1.residual", "layers.2.attention", "logits"} <= set(differing)
    assert [p for p in own.points if worst(isolated, theirs, p, batch) > 1e-5] == ["layers.1.mlp_norm"]


def test_a_rope_fault_shows_between_norm_and_attention(tmp_path, batch):
    rollout = parts.model()
    rollout.model.rotary_emb.inv_freq.mul_(0.9)
    theirs = trainer_side.record(side_of(rollout), batch, tmp_path / "rollout")
    isolated = trainer_side.record(side_of(parts.model()), batch, tmp_path / "isolated", inputs=theirs)
    differing = {p for p in isolated.points if worst(isolated, theirs, p, batch) > 1e-5}
    assert differing == {f"layers.{i}.{k}" for i in range(parts.LAYERS) for k in ("q_rope", "k_rope")}


def test_micro_batches_only_change_rounding(tmp_path, batch):
    network = parts.model()
    whole = trainer_side.record(side_of(network), batch, tmp_path / "a")
    small = trainer_side.record(side_of(network, rows=2), batch, tmp_path / "b")
    assert len(whole.table("embed")) == int(batch.attention_mask_BL.sum())
    assert torch.equal(whole.table("embed"), small.table("embed"))
    assert max(worst(whole, small, p, batch) for p in whole.points) < 1e-5


def test_wide_arithmetic_is_float64_through_hand_written_casts(tmp_path, batch):
    """The norms of transformers cast to float32 by hand; the wide pass must not."""
    side = side_of(parts.model())
    found = trainer_side.record(trainer_side.widened(side), batch, tmp_path)
    count = range(int(batch.attention_mask_BL.sum()))
    x = found.read("layers.1.residual", count, width=32)
    norm = side.network.model.layers[2].input_layernorm
    exact = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight.double()
    got = found.read("layers.2.input_norm", count, width=32)
    assert got.dtype == torch.float64
    assert float((got - exact).abs().max()) < 1e-13
    with Widened():
        assert torch.zeros(1, dtype=torch.bfloat16).to(torch.float32).dtype == torch.float32, "only float64 stays wide"


def test_the_wide_copy_leaves_the_model_alone(batch):
    network = parts.model()
    side = side_of(network)
    mirrored = network.lm_head.forward
    wide = trainer_side.widened(side)
    assert network.lm_head.forward is mirrored
    assert next(network.parameters()).dtype == torch.float32 and next(wide.network.parameters()).dtype == torch.float64


def faulty_rollout(tmp_path, batch, layer, attribute):
    rollout = parts.model()
    with torch.no_grad():
        rollout.get_submodule(f"model.layers.{layer}.{attribute}").weight.mul_(1.05)
    side = side_of(rollout)
    recorded = trainer_side.record(side, batch, tmp_path / "rollout")
    return recorded, trainer_side.logprobs(side, batch, head_dtype="float32", temperature=1.0)


@pytest.mark.parametrize(
    ("layer", "attribute", "cut"),
    [
        (0, "self_attn.o_proj", "layers.0.attn_out"),
        (1, "mlp.down_proj", "layers.1.residual"),
        (2, "self_attn.v_proj", "layers.2.attn_out"),
    ],
)
def test_patching_puts_the_whole_difference_where_the_fault_is(tmp_path, batch, layer, attribute, cut):
    recorded, rollout_BL = faulty_rollout(tmp_path, batch, layer, attribute)
    side = side_of(parts.model())
    own_BL = trainer_side.logprobs(side, batch, head_dtype="float32", temperature=1.0)
    found = trainer_side.attribute(side, batch, recorded, rollout_BL, own_BL, head_dtype="float32", temperature=1.0)
    shares = {r.cut: r.share for r in found}
    assert list(shares) == [c.name for c in trainer_side.cuts(side.mapping)] + ["logits", "logprobs"]
    assert shares[cut] == pytest.approx(1.0, abs=1e-3) and sum(shares.values()) == pytest.approx(1.0)
    whole = float((own_BL - rollout_BL)[batch.loss_mask_BL].abs().mean())
    remaining = {r.cut: r.remaining for r in found}
    before = list(shares)[: list(shares).index(cut)]
    assert all(remaining[name] == pytest.approx(whole, rel=1e-3) for name in before)
    assert remaining[cut] < whole * 1e-3


def test_unpatched_logprobs_are_the_trainers(batch):
    network = parts.model()
    own_BL = trainer_side.logprobs(side_of(network, rows=4), batch, head_dtype="float32", temperature=0.7)
    expected_BL = head_logprobs(network, hidden_states(network, batch, rows=4), batch, "float32", temperature=0.7)
    assert torch.equal(own_BL, expected_BL)


def test_a_patch_ends_with_the_pass(tmp_path, batch):
    recorded, rollout_BL = faulty_rollout(tmp_path, batch, 1, "mlp.up_proj")
    network = parts.model()
    side = side_of(network)
    own_BL = trainer_side.logprobs(side, batch, head_dtype="float32", temperature=1.0)
    trainer_side.attribute(side, batch, recorded, rollout_BL, own_BL, head_dtype="float32", temperature=1.0)
    assert torch.equal(own_BL, trainer_side.logprobs(side, batch, head_dtype="float32", temperature=1.0))
    assert all("forward" not in layer.__dict__ for layer in network.model.layers)


def test_logprobs_of_recorded_logits(tmp_path, batch):
    network = parts.model()
    side = side_of(network)
    found = trainer_side.record(side, batch, tmp_path)
    again_BL = trainer_side.from_logits(found, batch, 0.6, torch.float64)
    expected_BL = trainer_side.logprobs(side, batch, head_dtype="float32", temperature=0.6)
    assert torch.allclose(again_BL.float(), expected_BL, atol=1e-5)
    assert bool((again_BL[~batch.loss_mask_BL] == 0).all())


def test_attention_that_cannot_be_seen_is_refused(batch):
    network = parts.model()
    network.config._attn_implementation = "something_else"
    with (
        pytest.raises(ValueError, match="something_else.*sdpa or eager"),
        visited(network, parts.mapping(network).pairs, (1, 1), lambda point, value: None),
    ):
        pass
