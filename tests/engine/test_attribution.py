"""Attribution on the real engine: nothing to find where nothing is wrong, and one planted fault named exactly."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from rlalign.diagnose.attribution.mapping import BUILT_IN
from rlalign.diagnose.attribution.measure import measure
from rlalign.diagnose.attribution.sources import require_same_weights
from rlalign.diagnose.both_sides import trainer_network
from rlalign.rollout.engine import teacher_forcing
from rlalign.rollout.engine.teacher_forcing import Route
from rlalign.rollout.worker.recording import LOGITS, Tap
from rlalign.tiny_policy.tokenizer import byte_tokenizer
from rlalign.types import collate
from tests.engine.conftest import ROLLOUT, start, worker_of

LONG = [[5 + (7 * i + 3 * j) % 250 for j in range(12 + 5 * i)] for i in range(5)]


def sampled(engine):
    rollouts = engine.generate(LONG, prompt_ids=range(len(LONG)), samples=2, seed=3)
    return collate(rollouts, pad_token_id=0, spec=engine.spec)


@pytest.fixture(scope="module")
def exact(untied):
    engine = start(untied, dtype="float32")
    yield engine, sampled(engine)
    engine.close()


@torch.no_grad()
def products_that_round_apart(engine, network) -> set[str]:
    """Kinds whose product has other bits under vLLM than under torch on this host: two libraries, or one that looks at the rows."""
    theirs, ours = worker_of(engine._llm).get_model().model.layers[1], network.model.layers[1]
    pairs = {
        "q": (theirs.self_attn.qkv_proj, ours.self_attn.q_proj),
        "gate": (theirs.mlp.gate_up_proj, ours.mlp.gate_proj),
        "mlp_out": (theirs.mlp.down_proj, ours.mlp.down_proj),
    }
    found = set()
    for kind, (fused, plain) in pairs.items():
        x = torch.randn(256, plain.in_features, generator=torch.Generator().manual_seed(0))
        expected = plain(x)
        for rows in (1, 2, 5, 10, 17, 64, 110, 192, 256):
            got = fused.quant_method.apply(fused, x[:rows], bias=None)[:, : plain.out_features]
            if not torch.equal(got, expected[:rows]) or not torch.equal(plain(x[:rows]), expected[:rows]):
                found.add(kind)
    return found


def test_healthy_sides_differ_by_rounding_and_nothing_else(exact, untied):
    """Points without a product are equal in every bit everywhere; products where this host rounds them alike on both sides."""
    engine, batch = exact
    network = trainer_network(untied, "float32")
    apart = products_that_round_apart(engine, network)
    found = measure(engine, network, batch)
    assert found.first_over_floor is None
    for route in found.routes.values():
        assert 0 < route.delta_logp["abs_mean"] < 1e-5
        assert sum(route.logprob_share.values()) == pytest.approx(1.0)
        assert {p.point for p in route.points} >= {
            "embed",
            "layers.1.q",
            "layers.1.up",
            "layers.1.k_rope",
            "final_norm",
            "logprobs",
        }
        rounded = {p.kind for p in route.points if p.isolated.max > 0.0}
        assert not rounded & {"embed", "activation", "residual"}, "no product, no rounding"
        assert rounded & {"q", "gate", "mlp_out"} <= apart, "the same product of the same operands, and other bits"


def test_captured_activations_are_those_of_the_tokens(exact, untied, tmp_path):
    """Prefill, decode and transformers hold the same embedding row and nearly the same residual for the same token."""
    engine, batch = exact
    network = trainer_network(untied, "float32")
    taps = [Tap("embed", "model.embed_tokens", "output"), Tap("last", "model.norm", "output", 1)]
    with torch.no_grad():
        body = network.base_model(
            input_ids=batch.token_ids_BL, attention_mask=batch.attention_mask_BL, output_hidden_states=True
        )
    captured = []
    network.model.norm.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    with torch.no_grad():
        network.base_model(input_ids=batch.token_ids_BL, attention_mask=batch.attention_mask_BL)
    for route in Route:
        recording = teacher_forcing.record(engine, batch, taps, tmp_path / route.value, route=route).recording
        table = recording.table("embed")
        count = range(len(table))
        sequence, position, decoded = table.unbind(1)
        ids = batch.token_ids_BL[sequence, position]
        assert torch.equal(recording.read("embed", count, width=128), network.model.embed_tokens.weight[ids])
        expected = captured[0][sequence, position]
        torch.testing.assert_close(recording.read("last", count, width=128), expected, rtol=1e-4, atol=1e-4)
        first = batch.loss_mask_BL.int().argmax(1)
        assert torch.equal(
            decoded == 1, (position >= first[sequence]) if route is Route.decode else torch.zeros_like(decoded) == 1
        )
        logits = recording.table(LOGITS)
        got = recording.read(LOGITS, range(len(logits)), width=288)
        want = network.lm_head(body.last_hidden_state[logits[:, 0], logits[:, 1]])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_forced_decoding_gives_the_logprobs_of_the_forced_tokens(exact, tmp_path):
    engine, batch = exact
    other = replace(
        batch, token_ids_BL=torch.where(batch.loss_mask_BL, (batch.token_ids_BL + 11) % 250, batch.token_ids_BL)
    )
    decoded = teacher_forcing.record(engine, other, [], tmp_path / "d", route=Route.decode)
    prefilled = teacher_forcing.record(engine, other, [], tmp_path / "p", route=Route.prefill)
    torch.testing.assert_close(decoded.logprobs_BL, prefilled.logprobs_BL, rtol=0, atol=1e-4)
    assert float(decoded.logprobs_BL[other.loss_mask_BL].mean()) < -5, "made-up tokens are improbable"
    again = sampled(engine)
    assert torch.equal(again.token_ids_BL, batch.token_ids_BL), "the sampler is its own again"


def test_a_wrong_epsilon_in_the_engine_is_named(exact, untied):
    engine, batch = exact
    norm = worker_of(engine._llm).get_model().model.layers[1].post_attention_layernorm
    was, norm.variance_epsilon = norm.variance_epsilon, 1e-3
    try:
        found = measure(engine, trainer_network(untied, "float32"), batch, patch=False)
    finally:
        norm.variance_epsilon = was
    for route in found.routes.values():
        assert [p.point for p in route.suspects] == ["layers.1.mlp_norm"]


def test_a_stale_layer_is_named_and_the_weights_say_so(exact, untied, tmp_path):
    engine, batch = exact
    network = trainer_network(untied, "float32")
    assert require_same_weights(engine, network, tmp_path, anyway=False) == []
    with torch.no_grad():
        for name, parameter in network.model.layers[0].named_parameters():
            if "proj" in name:
                parameter.mul_(1 + 1e-3)
    found = measure(engine, network, batch)
    for route in found.routes.values():
        assert route.first_over_floor.point == "layers.0.q"
        assert {p.layer for p in route.suspects} == {0}
        assert route.logprob_share["layers.0.attn_out"] + route.logprob_share["layers.0.residual"] == pytest.approx(
            1, abs=0.01
        )
    with pytest.raises(RuntimeError, match=r"mismatched checkpoints.*7 tensors, model.layers.0.mlp.down_proj"):
        require_same_weights(engine, network, tmp_path, anyway=False)
    assert len(require_same_weights(engine, network, tmp_path, anyway=True)) == 1


def test_an_ignored_temperature_shows_on_the_decode_route_as_logprobs(untied, monkeypatch):
    engine = start(untied, dtype="float32", rollout=replace(ROLLOUT, temperature=0.6))
    try:
        batch, network = sampled(engine), trainer_network(untied, "float32")
        found = measure(engine, network, batch, patch=False)
        assert found.first_over_floor is None
        assert {name: r.temperature for name, r in found.routes.items()} == {"prefill": 1.0, "decode": 0.6}
        sampler = worker_of(engine._llm).model_runner.sampler
        monkeypatch.setattr(sampler, "apply_temperature", lambda logits, temperature, all_random: logits)
        found = measure(engine, network, batch)
        assert found.routes["prefill"].first_over_floor is None
        assert [p.point for p in found.routes["decode"].suspects] == ["logprobs"]
        assert found.routes["decode"].logprob_share["logprobs"] == pytest.approx(1.0, abs=1e-3)
    finally:
        engine.close()


def test_other_architectures_are_refused(exact, untied, tied):
    engine, batch = exact
    network = trainer_network(untied, "float32")
    with pytest.raises(ValueError, match="mismatched checkpoints.*tie_word_embeddings: False against True"):
        measure(engine, trainer_network(tied, "float32"), batch)
    network.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="num_hidden_layers: 2 against 3"):
        measure(engine, network, batch)
    network.config.num_hidden_layers = 2
    wrong = replace(BUILT_IN, layer=BUILT_IN.layer | {"attention": ("self_attn.output", "self_attn.o_proj input")})
    with pytest.raises(
        ValueError, match=r"(?s)rollout engine: model.layers.0.self_attn.output \(for layers.0.attention\).*--mapping"
    ):
        measure(engine, network, batch, pairs=wrong)


def test_a_mixture_of_experts_is_seen_to_its_router(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=288, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256, sliding_window=None, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer(256).save_pretrained(tmp_path)
    engine = start(tmp_path, dtype="float32")
    try:
        batch, network = sampled(engine), trainer_network(tmp_path, "float32")
        found = measure(engine, network, batch, patch=False)
        assert found.first_over_floor is None
        assert found.routes["decode"].experts_differ == {0: 0.0, 1: 0.0}
        with torch.no_grad():
            network.model.layers[1].mlp.gate.weight.add_(torch.randn(4, 128) * 0.05)
        found = measure(engine, network, batch, patch=False)
        assert found.first_over_floor.point == "layers.1.router"
        differ = found.routes["prefill"].experts_differ
        assert differ[0] == 0.0 and 0.02 < differ[1] < 0.6
    finally:
        engine.close()


PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path


def main():
    from rlalign.diagnose.attribution.measure import measure
    from rlalign.diagnose.both_sides import trainer_network
    from tests.engine.conftest import ROLLOUT, start
    from tests.engine.test_attribution import sampled

    folder = Path(sys.argv[1])
    engine = start(folder, dtype="float32", rollout=replace(ROLLOUT, tensor_parallel_size=2))
    batch, network = sampled(engine), trainer_network(folder, "float32")
    found = measure(engine, network, batch, patch=False)
    print("RESULT", found.tensor_parallel, found.first_over_floor and found.first_over_floor.point)
    network.model.layers[1].self_attn.k_proj.weight.data[-2:] *= 1.01  # of the last head, which the second rank holds
    print("RESULT", *(p.point for p in measure(engine, network, batch, patch=False).routes["decode"].suspects))
    engine.close()


if __name__ == "__main__":
    main()
"""


@pytest.mark.nightly
def test_two_tensor_parallel_ranks_are_joined(tmp_path, untied):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(program), str(untied)], capture_output=True, text=True, env=environment, timeout=1200
    )
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines == [["2", "None"], ["layers.1.k"]], done.stderr[-3000:]
