"""Points that are found out: on a model against itself, what was recorded at them must add up as the architecture says."""

import pytest
import torch

from rlalign.diagnose.attribution import derived, trainer_side
from rlalign.diagnose.attribution.derived import _Derivation, _probe, _traced, _width
from rlalign.diagnose.attribution.mapping import ModelMap, Pair
from rlalign.diagnose.attribution.trainer_side import Side
from rlalign.diagnose.families import building, family_table
from rlalign.rollout.worker.recording import Tap
from rlalign.types import LogprobSpec, Rollout, collate


def batch_of(ids):
    rollout = Rollout(
        token_ids=ids, loss_mask=[False] * 20 + [True] * 28, rollout_logprobs=[0.0] * 48, prompt_id=0, group_id=0,
        finish_reason="", version_spans=[(20, 48, 0)],
    )  # fmt: skip
    return collate([rollout], pad_token_id=0, spec=LogprobSpec())


def against_itself(family, tmp_path):
    """The trainer's model in the engine's place too: {point: values} of one sequence."""
    network = building.perturbed(building.build(family_table.RECIPES[family], tmp_path / "m"), seed=1, dtype="float32")
    batch = batch_of(building.probes()[0])
    seen = _traced(network, _probe(batch))
    weights = [n.rpartition(".") for n, p in network.named_parameters() if p.ndim <= 2]
    places = {module: (module, None) for module, _, leaf in weights if leaf == "weight"}
    outline = {
        name: {
            "class": type(network.get_submodule(name)).__name__,
            "inputs": [(i, _width(v)) for i, v in ran.inputs],
            "outputs": [(i, _width(v)) for i, v in ran.outputs],
        }
        for name, ran in seen.ran.items()
        if name
    }
    pairs = [pairs[0] for pairs in _Derivation(network, seen, outline, places, 1).points() if pairs]
    assert len({p.point for p in pairs}) == len(pairs)
    mapping = ModelMap(tuple(pairs), 2)
    found = trainer_side.record(Side(network, mapping), batch, tmp_path / "recorded")
    rows = range(len(found.table("embed")))
    return {p.point.removeprefix("layers.1."): found.read(p.point, rows, width=found.width(p.point)) for p in pairs}


SUMS = {  # family: {value of layer 1: what it is the sum of, with factors}
    "gemma3": {
        "mid_residual": {"layers.0.residual": 1.0, "post_attention_layernorm": 1.0},
        "residual": {"mid_residual": 1.0, "post_feedforward_layernorm": 1.0},
    },
    "gpt-neox": {"residual": {"layers.0.residual": 1.0, "attn_out": 1.0, "mlp_out": 1.0}},
    "olmo2": {"residual": {"gate:input": 1.0, "post_feedforward_layernorm": 1.0}},
    "granitemoehybrid": {"mid_residual": {"layers.0.residual": 1.0, "attn_out": 0.22}},
    "mamba2": {"residual": {"layers.0.residual": 1.0, "mixer:out_proj": 1.0}},
    "gpt2": {"mid_residual": {"layers.0.residual": 1.0, "attn_out": 1.0}, "residual": {"mid_residual": 1.0, "mlp_out": 1.0}},
}  # fmt: skip


@pytest.mark.parametrize("family", SUMS)
def test_the_residual_stream_adds_up(family, tmp_path):
    values = against_itself(family, tmp_path)
    for point, terms in SUMS[family].items():
        wanted = sum(factor * values[name].double() for name, factor in terms.items())
        torch.testing.assert_close(values[point].double(), wanted, rtol=1e-5, atol=1e-5)


def test_every_linear_layer_and_norm_is_a_point_of_its_own(tmp_path):
    """Also where the layers are of two kinds: a state-space mixer, and attention with a mixture beside shared experts."""
    names = against_itself("granitemoehybrid", tmp_path).keys()
    assert {"layers.0.mamba:in_proj", "layers.0.mamba:norm", "layers.0.mamba:out_proj", "router", "attn_out"} <= names
    assert {
        "block_sparse_moe",
        "shared_mlp:input_linear",
        "q",
        "k",
        "v",
        "q_rope",
        "attention",
        "mlp_norm",
    } - names <= {"q_rope"}


def test_layers_that_cannot_be_told_are_refused(tmp_path):
    network = building.perturbed(building.build(family_table.RECIPES["llama"], tmp_path / "m"), seed=1, dtype="float32")
    seen = _traced(network, _probe(batch_of(building.probes()[0])))
    with pytest.raises(
        ValueError, match=r"cannot tell the layers of LlamaForCausalLM: its configuration has 2.*--mapping"
    ):
        derived._Derivation(network, seen, {}, {"model.norm": ("model.norm", None)}, 1).points()


def test_an_engine_is_looked_at_once_when_the_built_in_pairs_are_refused(monkeypatch, tmp_path):
    """A layer that gives one tensor where the pairs expect two: what refused them is what the points are derived from."""
    tap, looks = Tap("residual", "model.norm", "output", 1), []
    seen = {"model.norm": {"inputs": [], "outputs": [(0, 8)]}}
    monkeypatch.setattr(derived.teacher_forcing, "modules", lambda engine: {})
    monkeypatch.setattr(derived, "match", lambda *names: ModelMap((Pair("residual", "residual", 0, tap, tap),), 1))
    monkeypatch.setattr(derived, "_outline", lambda engine, batch: looks.append(batch.token_ids_BL.shape) or seen)
    monkeypatch.setattr(derived, "derive", lambda engine, network, small, outline, folder: (small, outline))
    small, outline = derived.mapping_of(None, torch.nn.Linear(1, 1), batch_of([5] * 48), None, tmp_path)
    assert looks == [small.token_ids_BL.shape] and outline is seen
