"""Families whose weights the engine keeps in another form than the trainer: what was published is what it computes with."""

import json
import re

import pytest
import torch

from rlalign.diagnose.attribution.measure import measure, prove_steps
from rlalign.diagnose.families import building, family_table
from rlalign.rollout.engine import own_process, teacher_forcing
from rlalign.rollout.engine.arguments import require_dtype, require_one_window, require_reloads
from rlalign.rollout.worker import readback
from rlalign.trainer.checkpoint_names import as_checkpoint
from rlalign.types import collate
from rlalign.weights import publish
from tests.engine.conftest import start, worker_of


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A mixture of experts: (folder, engine in float32)."""
    folder = building.build(family_table.RECIPES["qwen3-moe"], tmp_path_factory.mktemp("families") / "qwen3-moe")
    engine = start(folder, dtype="float32")
    yield folder, engine
    engine.close()


def published(folder, engine, tmp_path, *, version, seed):
    model = building.perturbed(folder, seed=seed, dtype="float32")
    return model, publish(as_checkpoint(model, model.named_parameters()), version, receiver=engine, shared=tmp_path)


def apart(engine, model) -> float:
    sequences = building.probes()
    scores = torch.tensor(engine.score(sequences), dtype=torch.float64)
    return float((scores - building.reference(model, sequences)).abs().max())


def experts_of(engine):
    modules = worker_of(engine._llm).get_model().named_modules()
    return next(m for _, m in modules if hasattr(m, "w13_weight"))


def test_a_mixture_is_published_and_equals_transformers(experts, tmp_path):
    folder, engine = experts
    for version, seed in ((1, 1), (2, 2)):
        model, report = published(folder, engine, tmp_path, version=version, seed=seed)
        assert apart(engine, model) < 1e-4
        assert report.proofs["kernel"] and report.proofs["packed"] == 2 * 4 * 3, report.proofs


def test_experts_that_vllm_does_not_pack_again_are_repaired_or_refused(experts, tmp_path, monkeypatch):
    """vLLM 0.32 on CPU packs experts at start-up only. Where the host's kernel packs nothing there is nothing to repair."""
    folder, engine = experts
    _, report = published(folder, engine, tmp_path, version=3, seed=3)
    monkeypatch.setattr(readback, "repack", lambda expected: False)
    if report.repaired:
        with pytest.raises(
            RuntimeError, match=r"experts\.\d+\.\w+_proj\.weight: the engine computes with something else"
        ):
            published(folder, engine, tmp_path, version=4, seed=4)
    monkeypatch.undo()
    model, _ = published(folder, engine, tmp_path, version=4, seed=4)
    assert apart(engine, model) < 1e-4


def test_a_stale_expert_is_named_without_loading_anything(experts, tmp_path):
    folder, engine = experts
    model, _ = published(folder, engine, tmp_path, version=5, seed=5)
    weights = list(as_checkpoint(model, model.named_parameters()))
    assert teacher_forcing.differing_weights(engine, weights, shared=tmp_path) == {0: []}
    layer = experts_of(engine)
    kept = layer.w2_weight.detach().clone()
    layer.w2_weight.data.view(-1)[0] += 1.0
    (found,) = teacher_forcing.differing_weights(engine, weights, shared=tmp_path).values()
    assert found and all("down_proj" in line and "layers.0" in line for line in found)
    layer.w2_weight.data.copy_(kept)
    assert (
        teacher_forcing.differing_weights(engine, weights, shared=tmp_path) == {0: []} and apart(engine, model) < 1e-4
    )


def test_parts_of_a_fused_weight_that_come_alone_are_refused(experts, tmp_path):
    folder, engine = experts
    model, _ = published(folder, engine, tmp_path, version=6, seed=6)
    alone = [
        (n, p)
        for n, p in as_checkpoint(model, model.named_parameters())
        if n.endswith("layers.1.self_attn.q_proj.weight")
    ]
    with pytest.raises(RuntimeError, match=r"qkv_proj\.weight: only part of it came"):
        publish(alone, 7, receiver=engine, shared=tmp_path)
    model, _ = published(folder, engine, tmp_path, version=7, seed=7)
    assert apart(engine, model) < 1e-4


def test_a_loader_that_vouches_for_itself_is_caught_by_its_output(experts, tmp_path, monkeypatch):
    """Keys where values belong: the read-back's twin is loaded the same way and agrees; the trainer's modules do not."""
    folder, engine = experts
    model, _ = published(folder, engine, tmp_path, version=8, seed=8)
    found = prove_steps(engine, model, scratch=tmp_path)
    assert max(found.values()) < 1e-4 and {
        "layers.1.v",
        "layers.1.attention",
        "layers.0.router",
        "layers.0.mlp_out",
    } <= set(found)
    architecture = type(worker_of(engine._llm).get_model())
    load, other = architecture.load_weights, {"k": "v", "v": "k"}

    def swapping(self, weights):
        return load(
            self,
            ((re.sub(r"(?<=layers\.1\.self_attn\.)[kv](?=_proj)", lambda m: other[m[0]], n), w) for n, w in weights),
        )

    monkeypatch.setattr(architecture, "load_weights", swapping)
    model, report = published(folder, engine, tmp_path, version=9, seed=9)
    assert report.proof_of["model.layers.1.self_attn.k_proj.weight"] == "kernel"
    with pytest.raises(RuntimeError, match=r"computes something else with them.*layers\.1\.[kv] by 1\d\d%"):
        prove_steps(engine, model, scratch=tmp_path)
    monkeypatch.undo()
    model, _ = published(folder, engine, tmp_path, version=10, seed=10)
    assert max(prove_steps(engine, model, scratch=tmp_path).values()) < 1e-4


def test_a_convolution_that_is_kept_twice_is_published_twice(tmp_path):
    """Mamba 2 in bfloat16 on CPU: vLLM packs the weight away from the view that the mixer convolves with, and reloads only one."""
    folder = building.build(family_table.RECIPES["mamba2"], tmp_path / "mamba2")
    engine, model = start(folder, dtype="bfloat16"), building.perturbed(folder, seed=1, dtype="bfloat16")
    try:
        weights = list(as_checkpoint(model, model.named_parameters()))
        publish(weights, 1, receiver=engine, shared=tmp_path)
        sequences = building.probes()
        apart = torch.tensor(engine.score(sequences), dtype=torch.float64) - building.reference(model, sequences)
        assert float((apart.exp() - 1 - apart).mean()) < 5e-3  # 6e-2 with the old convolution
        mixer = next(m for m in worker_of(engine._llm).get_model().modules() if hasattr(m, "conv_weights"))
        assert teacher_forcing.differing_weights(engine, weights, shared=tmp_path) == {0: []}
        mixer.conv_weights.view(-1)[0] += 1.0
        (found,) = teacher_forcing.differing_weights(engine, weights, shared=tmp_path).values()
        assert len(found) == 1 and "layers.0.mixer.conv1d.weight" in found[0]
    finally:
        engine.close()


def test_the_bias_of_an_lm_head_that_every_load_makes_anew_is_published(tmp_path):
    """Phi, through vLLM's transformers backend; the bias comes before the weight, as no model has them."""
    folder = building.build(family_table.RECIPES["phi"], tmp_path / "phi")
    engine, model = start(folder, dtype="float32"), building.perturbed(folder, seed=1, dtype="float32")
    try:
        weights = sorted(as_checkpoint(model, model.named_parameters()), key=lambda w: w[0] != "lm_head.bias")
        report = publish(weights, 1, receiver=engine, shared=tmp_path)
        assert report.proof_of["lm_head.bias"] == "bytes" and apart(engine, model) < 1e-4
    finally:
        engine.close()


def test_a_layer_of_another_shape_is_attributed_to_its_norms(tmp_path):
    """Gemma 3 has norms behind attention and MLP, which no list of ours pairs; a fault of one is named exactly."""
    folder = building.build(family_table.RECIPES["gemma3"], tmp_path / "gemma3")
    engine, model = start(folder, dtype="float32"), building.perturbed(folder, seed=1, dtype="float32", size=0.0)
    try:
        rollouts = engine.generate([s[:24] for s in building.probes()], prompt_ids=range(3), samples=4, seed=0)
        batch = collate(rollouts, pad_token_id=0, spec=engine.spec)
        found = measure(engine, model, batch)
        assert found.first_over_floor is None
        assert {"embed", "layers.1.post_feedforward_layernorm", "layers.0.mid_residual", "layers.1.k_rope"} <= {
            p.point for p in found.points
        }
        with torch.no_grad():
            model.model.layers[1].post_feedforward_layernorm.weight.add_(0.05)
        found = measure(engine, model, batch, patch=False)
        assert [p.point for p in found.routes["decode"].suspects] == ["layers.1.post_feedforward_layernorm"]
    finally:
        engine.close()


def test_an_engine_over_transformers_classes_gets_a_process_of_its_own(tmp_path):
    def reason(architecture: str) -> str | None:
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        return own_process.needed_for(tmp_path)

    assert reason("LlamaForCausalLM") is None and reason("Qwen3MoeForCausalLM") is None
    for architecture in ("Olmo2ForCausalLM", "SmolLM3ForCausalLM", "GPTNeoXForCausalLM"):
        assert f"vLLM serves {architecture} through transformers' classes" in reason(architecture)
    assert "no model of its own for NobodysForCausalLM" in reason("NobodysForCausalLM")


def test_a_dtype_that_vllm_has_no_layers_for_on_this_device_is_refused_before_anything_runs(tmp_path):
    for about in (
        {"model_type": "deepseek_v3", "kv_lora_rank": 32},
        {"model_type": "qwen3_next", "linear_key_head_dim": 32},
    ):
        (tmp_path / "config.json").write_text(json.dumps(about))
        if torch.cuda.is_available():
            require_dtype(tmp_path, "float32")
        else:
            with pytest.raises(ValueError, match=r"model.dtype=float32: vLLM on CPU computes .* in bfloat16 only"):
                require_dtype(tmp_path, "float32")
        require_dtype(tmp_path, "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "minicpm3", "kv_lora_rank": 32}))
    require_dtype(tmp_path, "float32")  # served with ordinary attention
    require_reloads(tmp_path)


def test_weights_that_vllm_cannot_load_again_are_refused_before_anything_runs(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "kv_lora_rank": 512}))
    if torch.cuda.is_available():
        require_reloads(tmp_path)
    else:
        with pytest.raises(ValueError, match=r"cannot take new weights for latent attention \(deepseek_v3\)"):
            require_reloads(tmp_path)


def test_a_context_beyond_cohere2s_window_is_refused_before_anything_runs(tmp_path):
    """Cohere 2: up to its length both see every token, beyond it vLLM sees one more."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "cohere2", "sliding_window": 64}))
    require_one_window(tmp_path, 64)
    with pytest.raises(ValueError, match=r"max_model_len=65: .* its sliding layers see 65 tokens.* Use at most 64"):
        require_one_window(tmp_path, 65)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text", "sliding_window": 64}))
    require_one_window(tmp_path, 65)
