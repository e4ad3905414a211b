"""Exact mode: the bits of a row depend on that row alone, and the values are those of the plain operations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers.activations import GELUActivation

from rlalign.diagnose.both_sides import head_logprobs, hidden_states
from rlalign.head import exact
from rlalign.trainer.exact_network import make_exact
from rlalign.trainer.head_mirror import mirror
from tests import attribution_parts as parts


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 32), (100, 45), (1408, 96)])
def test_a_row_has_the_same_bits_alone_in_any_batch_and_in_any_part_of_a_fused_weight(dtype, inputs, outputs):
    rows, weight, bias = (normal(n, inputs, seed=n, dtype=dtype) for n in (70, outputs, 1))
    bias = normal(outputs, seed=9, dtype=dtype) if bias is not None else None
    whole = exact.linear(rows, weight, bias)
    assert torch.equal(exact.linear(rows[41:42], weight, bias)[0], whole[41])
    assert torch.equal(exact.linear(rows.flip(0), weight, bias).flip(0), whole)
    assert torch.equal(exact.linear(rows.view(7, 10, inputs), weight, bias).view(70, outputs), whole)
    fused = torch.cat([normal(64, inputs, seed=5, dtype=dtype), weight])
    assert torch.equal(exact.linear(rows, fused)[:, 64:], exact.linear(rows, weight)), "q, k and v in one projection"


def test_products_are_those_of_float64_up_to_one_accumulation():
    rows, weight = normal(50, 300), normal(40, 300, seed=1)
    expected = rows.double() @ weight.double().T
    assert float((exact.linear(rows, weight) - expected).abs().max()) < 1e-4
    assert exact.linear(rows.bfloat16(), weight.bfloat16(), dtype=torch.float32).dtype == torch.float32
    assert exact.linear(rows[:0], weight).shape == (0, 40)


@given(st.integers(1, 150), st.integers(0, 149), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
@pytest.mark.slow
def test_a_query_has_the_same_bits_whatever_comes_after_it_and_beside_it(length, at, seed):
    at = min(at, length - 1)
    query, key, value = (
        normal(length, 4, 16, seed=seed),
        normal(length, 2, 16, seed=seed + 1),
        normal(length, 2, 16, seed=seed + 2),
    )
    whole = exact.attend(query, key, value, first=0, scale=0.25)
    decoded = exact.attend(query[at : at + 1], key[: at + 1], value[: at + 1], first=at, scale=0.25)
    assert torch.equal(decoded[0], whole[at]), "decoding sees no later keys"
    chunk = exact.attend(query[at:], key, value, first=at, scale=0.25)
    assert torch.equal(chunk, whole[at:]), "a chunk of a prefill"


def test_attention_is_causal_softmax_attention():
    query, key, value = normal(90, 4, 16), normal(90, 2, 16, seed=1), normal(90, 2, 16, seed=2)
    heads = [x.transpose(0, 1)[None].double() for x in (query, key, value)]
    expected = functional.scaled_dot_product_attention(*heads, is_causal=True, scale=0.3, enable_gqa=True)[0].transpose(
        0, 1
    )
    assert float((exact.attend(query, key, value, first=0, scale=0.3) - expected).abs().max()) < 1e-5


def test_long_contexts_are_cut_into_pieces_that_change_no_bit(monkeypatch):
    query, key, value = normal(60, 2, 8), normal(60, 2, 8, seed=1), normal(60, 2, 8, seed=2)
    whole = exact.attend(query, key, value, first=0, scale=1.0)
    monkeypatch.setattr(exact, "ELEMENTS", 4096)
    assert torch.equal(exact.attend(query, key, value, first=0, scale=1.0), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_rope_have_the_bits_of_transformers(dtype):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    norm = Qwen3RMSNorm(64, eps=1e-5).to(dtype)
    norm.weight.data = normal(64, seed=3, dtype=dtype)
    hidden = normal(30, 64, dtype=dtype)
    assert torch.equal(exact.rms_norm(hidden, norm.weight, 1e-5), norm(hidden))
    states, angles = normal(30, 4, 16, dtype=dtype), normal(30, 16, seed=2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected, _ = apply_rotary_pos_emb(states.transpose(0, 1)[None], states.transpose(0, 1)[None], cos[None], sin[None])
    assert torch.equal(exact.rotate(states, cos, sin), expected[0].transpose(0, 1))


@given(st.integers(1, 200))
@settings(max_examples=25, deadline=None)
def test_silu_has_the_same_bits_at_the_end_of_a_tensor(count):
    values = 4 * normal(200, seed=4)
    assert torch.equal(exact.silu(values[:count].clone()), exact.silu(values)[:count])
    assert torch.allclose(exact.silu(values), functional.silu(values), atol=1e-6)


def test_an_exact_model_is_the_model_and_does_not_know_its_batch():
    batch, network = parts.batch(), parts.model()
    plain_BLD = hidden_states(network, batch)
    make_exact(network)
    whole_BLD = hidden_states(network, batch)
    mask_BL = batch.attention_mask_BL
    assert float((plain_BLD - whole_BLD)[mask_BL].abs().max()) < 1e-4
    alone_BLD = hidden_states(network, batch, rows=1)
    assert torch.equal(alone_BLD[mask_BL], whole_BLD[mask_BL])
    logprobs_BL = head_logprobs(network, whole_BLD, batch, "float32", temperature=0.7)
    first = batch.rows(slice(0, 1))
    assert torch.equal(logprobs_BL[:1], head_logprobs(network, alone_BLD[:1], first, "float32", temperature=0.7))


def test_gradients_are_those_of_the_plain_model():
    batch = parts.batch()
    gradients = []
    for network in (parts.model(), make_exact(parts.model())):
        body = network.base_model(input_ids=batch.token_ids_BL, attention_mask=batch.attention_mask_BL)
        logits_BLV = network.get_output_embeddings()(body.last_hidden_state)
        logits_BLV.log_softmax(-1)[batch.loss_mask_BL].square().mean().backward()
        gradients.append({n: p.grad.double() for n, p in network.named_parameters()})
    for name, plain in gradients[0].items():
        assert float((plain - gradients[1][name]).norm()) < 1e-4 * float(plain.norm()), name


@pytest.mark.parametrize("head_dtype", ["model", "float32"])
def test_the_head_keeps_its_products_and_rounds_them_where_asked(head_dtype):
    batch, network = parts.batch(2), make_exact(parts.model().bfloat16())
    hidden_BLD = hidden_states(network, batch)
    status = mirror(network, head_dtype=head_dtype, chunk=0)
    logits = network.get_output_embeddings()(hidden_BLD)
    assert (status.mode, status.dtype) == {"model": ("off", "bfloat16"), "float32": ("exact", "float32")}[head_dtype]
    expected = exact.linear(hidden_BLD, network.lm_head.weight, dtype=torch.float32)
    assert torch.equal(logits, expected if head_dtype == "float32" else expected.bfloat16())
    with pytest.raises(ValueError, match="not with its master"):
        mirror(network, head_dtype="master", chunk=0)


def test_other_devices_and_activations_are_refused():
    with pytest.raises(ValueError, match="for the CPU so far; the trainer's model is on meta"):
        make_exact(parts.model().to("meta"))
    with pytest.raises(ValueError, match="knows silu only: model.layers.0.mlp.act_fn is GELU"):
        network = parts.model()
        network.model.layers[0].mlp.act_fn = GELUActivation()
        make_exact(network)


def test_masks_that_are_not_causal_and_right_padded_are_refused():
    batch, network = parts.batch(2), make_exact(parts.model())
    with pytest.raises(ValueError, match="right-padded"):
        network(input_ids=batch.token_ids_BL, attention_mask=batch.attention_mask_BL.flip(1))


def test_a_machine_whose_products_depend_on_the_place_is_refused(monkeypatch):
    exact.require_reproducible()
    true = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda a, b: true(a, b) + torch.arange(a.shape[-2])[:, None] * 1e-6)
    with pytest.raises(RuntimeError, match="depend on where a row lies"):
        exact.require_reproducible()
