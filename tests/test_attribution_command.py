"""The command around attribution: mappings, where tokens come from, the words, the page, and what is refused."""

import argparse
import json
import re
from dataclasses import replace

import pytest

from rlalign.cli import main
from rlalign.commands import attribute
from rlalign.diagnose.attribution import report
from rlalign.diagnose.attribution.findings import Attribution, Bias, PointDifference, RouteAttribution, Spread
from rlalign.diagnose.attribution.mapping import LAYER_PAIRS, match, parse, read_pairs
from rlalign.diagnose.attribution.sources import budget, of_run
from rlalign.diagnose.attribution.trainer_side import Removed, module_names
from rlalign.report.drawings import BELOW, FAULT, NOTHING, Scale, heat_map, scale_of
from rlalign.rollout.worker.recording import Tap
from tests import attribution_parts as parts

YAML = """
layers: {rollout: model.layers, trainer: model.layers}
model: {embed: model.embed_tokens, final_norm: model.norm}
layer:
  q: {rollout: self_attn.qkv_proj part 0, trainer: self_attn.q_proj}
  attn_out: self_attn.o_proj
  residual: {rollout: + output 1, trainer: .}
optional: [q]
"""


def test_built_in_pairs_are_found_in_order_with_their_sides():
    found = parts.mapping(parts.model())
    kinds = [kind for kind in LAYER_PAIRS if kind != "router"]
    assert [p.point for p in found.pairs] == [
        "embed",
        *(f"layers.{i}.{k}" for i in range(3) for k in kinds),
        "final_norm",
    ]
    assert found.pair("layers.1.k").rollout == Tap("layers.1.k", "model.layers.1.self_attn.qkv_proj", "output", 0, 1)
    assert found.pair("layers.1.residual").rollout == Tap(
        "layers.1.residual", "model.layers.2.input_layernorm", "output", 1
    )
    assert found.pair("layers.2.residual").rollout == Tap("layers.2.residual", "model.norm", "output", 1), (
        "the last has no next"
    )
    assert found.pair("layers.2.q_rope").trainer == Tap("layers.2.q_rope", "model.layers.2.self_attn", "attention", 0)


def test_an_unknown_architecture_says_what_it_looked_for_and_what_there_is():
    trainer = module_names(parts.model())
    rollout = {
        name.replace("post_attention_layernorm", "ffn_norm"): kind for name, kind in parts.rollout_names().items()
    }
    with pytest.raises(ValueError) as raised:
        match(rollout, trainer)
    text = str(raised.value)
    assert "rollout engine: model.layers.0 consists of ['ffn_norm', 'input_layernorm', 'mlp', 'self_attn']" in text
    assert "rollout engine: model.layers.0.post_attention_layernorm (for layers.0.mid_residual)" in text
    assert "--mapping FILE.yaml" in text
    assert "rollout: Qwen3ForCausalLM with model, model.embed_tokens" in text


def test_models_without_layers_and_with_different_depths():
    trainer = module_names(parts.model())
    with pytest.raises(ValueError, match="mismatched checkpoints: 0 layers in the rollout engine"):
        match({"": "GPT2", "transformer.h": "ModuleList"}, trainer)
    with pytest.raises(ValueError, match="no layers under 'model.layers'"):
        match({"": "GPT2"}, {"": "GPT2"})


def test_a_mapping_file_replaces_the_built_in_pairs(tmp_path):
    file = tmp_path / "pairs.yaml"
    file.write_text(YAML)
    found = match(parts.rollout_names(), module_names(parts.model()), read_pairs(file))
    points = [p.point for p in found.pairs]
    assert (
        points[:4] == ["embed", "layers.0.q", "layers.0.attn_out", "layers.0.residual"] and points[-1] == "final_norm"
    )
    assert found.pair("layers.0.q").rollout.part == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: 3", "expected the keys layers, model, layer"),
        (YAML.replace("residual:", "rest:"), "lacks 'residual'"),
        (YAML.replace("final_norm", "norm"), "lacks \\['final_norm'\\]"),
        (YAML.replace("trainer: .", "train: ."), "expected a module or"),
        ("a: [", "mapping .*pairs.yaml"),
    ],
)
def test_bad_mapping_files_are_refused(tmp_path, text, message):
    file = tmp_path / "pairs.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs(file)


def test_taps_are_read_or_refused():
    assert parse("p", "a.b input 2") == Tap("p", "a.b", "input", 2)
    assert parse("p", "a part 1") == Tap("p", "a", "output", 0, 1)
    with pytest.raises(ValueError, match="cannot read 'a outputs 1'"):
        parse("p", "a outputs 1")


def test_the_budget_keeps_whole_sequences_and_cuts_the_padding():
    batch = parts.batch(6)
    lengths = batch.attention_mask_BL.sum(1).tolist()
    kept = budget(batch, sum(lengths[:3]))
    assert len(kept) == 3 and kept.token_ids_BL.shape[1] == lengths[2]
    assert len(budget(batch, 1)) == 1, "at least one"


def test_run_directories_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="no such run directory"):
        of_run(tmp_path / "none", None, 100)
    (tmp_path / "run.json").write_text(json.dumps({"schema_version": 0}))
    with pytest.raises(ValueError, match="run directory of schema 0; this rlalign reads schema"):
        of_run(tmp_path, None, 100)


def test_options_that_contradict_each_other(tmp_path, capsys):
    assert main(["attribute", "--run", str(tmp_path), "seed=1"]) == 2
    assert "leave out overrides" in capsys.readouterr().err
    assert main(["attribute", "--step", "3"]) == 2
    assert "give the run with --run" in capsys.readouterr().err
    assert main(["attribute", "--run", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    parser = argparse.ArgumentParser()
    attribute.add_options(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--route", "sideways"])


# What is shown of a result


def spread(value: float) -> Spread:
    return Spread(value, 2 * value, 3 * value)


def point(name: str, *, excess: float = 0.5, bias: Bias = Bias()) -> PointDifference:  # noqa: B008 (frozen)
    layer = int(name.split(".")[1]) if name.startswith("layers.") else None
    return PointDifference(
        point=name, kind=name.split(".")[-1], layer=layer, tokens=40, absolute=spread(1e-3), relative=spread(1e-2), cosine=1 - 1e-6,
        cosine_min=0.9, floor=spread(1e-2), isolated=spread(excess * 1e-3), isolated_floor=spread(1e-3), bias=bias, bias_floor=1e-4,
    )  # fmt: skip


def result(**excess: float) -> Attribution:
    names = [
        "embed",
        *(f"layers.{i}.{k}" for i in range(4) for k in ("input_norm", "q_rope", "attn_out", "residual")),
        "logprobs",
    ]
    points = tuple(point(n, excess=excess.get(n.replace(".", "_"), 0.5)) for n in names)
    cuts = [
        "embed",
        *(f"layers.{i}.{k}" for i in range(4) for k in ("attn_out", "residual")),
        "final_norm",
        "logits",
        "logprobs",
    ]
    removed = tuple(Removed(c, 1e-3, 0.7 if c == "layers.2.attn_out" else 0.3 / (len(cuts) - 1)) for c in cuts)
    route = RouteAttribution(
        route="prefill", temperature=1.0, points=points, removed=removed, experts_differ={},
        delta_logp={"mean": 0.0, "abs_mean": 2e-3, "abs_max": 5e-2}, heat=dict.fromkeys(names, (1e-3, None, 2e-2)),
    )  # fmt: skip
    return Attribution(
        model="<b>Model</b>", body_dtype="bfloat16", head_dtype="float32", tensor_parallel=1, layers=4, sequences=3, length=3,
        scored_tokens=9, routes={"prefill": route}, decode_against_prefill={}, floor_sources=("alone",), disk_bytes=1,
    )  # fmt: skip


def test_the_first_step_over_its_floor_in_the_order_of_computation():
    found = result(layers_1_q_rope=50.0, layers_3_q_rope=90.0, layers_1_attn_out=4.0)
    assert found.first_over_floor.point == "layers.1.q_rope"
    assert [p.point for p in found.routes["prefill"].suspects] == [
        "layers.3.q_rope",
        "layers.1.q_rope",
        "layers.1.attn_out",
    ]
    text = " ".join(report.verdict(found))
    assert "layers.1.q_rope (queries after rope, layer 1), 50 times its floor" in text
    assert "rope theta or scaling, position ids" in text
    assert "also over their floors: q_rope in layer 3 (90 times); attn_out in layer 1 (4.0 times)" in text


def test_three_times_the_floor_is_the_limit_and_a_bias_alone_is_enough():
    assert result(embed=2.99).first_over_floor is None and result(embed=3.01).first_over_floor is not None
    assert point("embed", excess=0.1, bias=Bias(1e-3, "feature 7")).over_floor
    assert not point("embed", excess=0.1, bias=Bias(1e-4, "all")).over_floor


def test_without_a_finding_the_shares_are_said():
    text = " ".join(report.verdict(result()))
    assert "No step by itself differs by more than rounding explains" in text and "layers.2.attn_out 70%" in text
    route = result().routes["prefill"]
    equal = replace(
        result(), routes={"prefill": replace(route, delta_logp={"mean": 0.0, "abs_mean": 0.0, "abs_max": 0.0})}
    )
    assert "bit for bit" in report.verdict(equal)[0]


def test_the_table_marks_findings_and_shows_other_points_on_request():
    found = result(layers_1_q_rope=50.0)
    lines = report.text(found).splitlines()
    assert [line.split()[0] for line in lines if line.endswith("<-")] == ["layers.1.q_rope"]
    assert not any(line.startswith("layers.2.q_rope") for line in lines)
    assert any(line.startswith("layers.2.q_rope") for line in report.text(found, every=True).splitlines())


def test_the_page_is_self_contained_escapes_names_and_says_the_verdict(tmp_path):
    out = report.write(result(layers_1_q_rope=50.0), ["note <script>"], tmp_path / "a.html")
    text = out.read_text()
    assert "<script" not in text and "<b>Model</b>" not in text and "&lt;b&gt;Model" in text
    assert not re.search(r"(?:src|href)=|url\(|@import", text)
    assert "layers.1.q_rope differs by itself" in text and "note &lt;script&gt;" in text
    assert "Rounding, and nothing else" in report.render(result(), [])


def test_json_is_strict_and_complete():
    plain = json.loads(json.dumps(result(layers_1_q_rope=float("inf")).as_json(), allow_nan=False))
    route = plain["routes"]["prefill"]
    assert route["first_over_floor"] == "layers.1.q_rope" and route["suspects"] == ["layers.1.q_rope"]
    assert sum(route["logprob_share"].values()) == pytest.approx(1.0)
    assert next(p for p in route["points"] if p["point"] == "layers.1.q_rope")["excess"] == "inf"


def test_colours_grow_with_the_value_and_nothing_is_grey():
    scale = Scale(1.0, 100.0, FAULT, under=BELOW)
    assert scale.color(None) == NOTHING and scale.color(0.5) == BELOW
    assert scale.color(1.0) == FAULT[0] and scale.color(1e9) == FAULT[-1]
    reds = [int(scale.color(v)[3:5], 16) for v in (1, 3, 10, 30, 100)]
    assert reds == sorted(reds, reverse=True), "green falls towards red"
    assert scale_of([None, 0.0, 1e-9, 1e-2]).low == pytest.approx(1e-6)
    assert scale_of([]).high > scale_of([]).low
    assert heat_map([("a", [1.0, None])], ["0", "1"], scale, axis="x").count("<rect") == 2
