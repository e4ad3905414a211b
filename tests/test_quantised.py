"""Fake-quantised bodies: formats against other people's code, the network against a cache and layers written out, the budget."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

from rlalign import mismatch
from rlalign.cli import main
from rlalign.diagnose.attribution import budget
from rlalign.diagnose.attribution.budget import Budget, Divergence, measure
from rlalign.head.multiplied import Multiplied
from rlalign.trainer import fake_quantised as quantised
from rlalign.trainer.fake_quantised import FORMATS, KV_FORMATS, Recipe, fake_quantised
from tests import attribution_parts as parts


def values(rows: int = 96, columns: int = 256, seed: int = 0) -> torch.Tensor:
    """Heavy tails, outlier channels, zeros, a row of nothing."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3
    x[:, 7] *= 50
    x[3], x[:, 11] = 0.0, 0.0
    return x


# Formats


def e4m3_codes() -> torch.Tensor:
    """Every finite float8_e4m3fn by its definition: 4 exponent bits with bias 7, 3 mantissa bits, no infinity."""
    found = [(m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)) for e in range(16) for m in range(8)]
    return torch.tensor(found[:-1], dtype=torch.float64)  # the last one is NaN


E2M1_CODES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def nearest(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """In float64, the code next to |x|; of two equally near ones the one with an even number."""
    apart = (x.double().abs()[..., None] - codes).abs()
    tied = apart == apart.amin(-1, keepdim=True)
    even = torch.where(tied, torch.arange(len(codes)) % 2, 9).argmin(-1)
    return codes[even] * x.double().sign()


@pytest.mark.parametrize(("rounded", "codes"), [(quantised.e4m3, e4m3_codes()), (quantised.e2m1, E2M1_CODES)])
def test_rounding_is_to_the_nearest_code_and_ties_go_to_even(rounded, codes):
    ties = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([codes, ties, ties * (1 + 2**-20), ties * (1 - 2**-20), codes[-1:] * 3, values().flatten().double()])
    x = torch.cat([x, -x]).float()
    assert torch.equal(rounded(x).double(), nearest(x, codes))


def test_towards_zero_is_the_largest_code_that_is_not_larger():
    codes = e4m3_codes()
    x = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, values().flatten().double(), torch.tensor([1e4])]).float()
    at = torch.searchsorted(codes, x.double().abs(), right=True) - 1
    found = quantised.e4m3_towards_zero(torch.cat([x, -x])).double()
    assert torch.equal(found, torch.cat([codes[at] * x.sign(), -codes[at] * x.sign()]))
    assert quantised.e4m3_towards_zero(torch.tensor([float("nan")])).isnan().all()


def compressed(x: torch.Tensor, **how: object) -> torch.Tensor:
    """compressed-tensors' fake quantisation with the scales of its own observers."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = QuantizationArgs(num_bits=8, type="float", symmetric=True, **how)
    kind = how["strategy"]
    if kind == "block":
        blocks = x.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    elif kind == "group":
        groups = x.unflatten(1, (-1, how["group_size"]))
        low, high = groups.amin(-1), groups.amax(-1)
    else:
        low, high = (x.amin(), x.amax()) if kind == "tensor" else (x.amin(1, keepdim=True), x.amax(1, keepdim=True))
    return fake_quantize(x, *calculate_qparams(low, high, arguments), arguments)


@pytest.mark.parametrize(
    ("ours", "how"),
    [
        (quantised.of_tensor, {"strategy": "tensor"}),
        (quantised.of_rows, {"strategy": "channel"}),
        (quantised.of_groups, {"strategy": "group", "group_size": 128}),
        (quantised.of_blocks, {"strategy": "block", "block_structure": [128, 128]}),
    ],
)
def test_fp8_scales_are_those_of_compressed_tensors(ours, how):
    x = values(256, 256)
    assert torch.equal(ours(x), compressed(x, **how))


def test_mxfp8_and_nvfp4_are_those_of_vllm():
    from vllm.model_executor.layers.quantization.utils import mxfp8_utils, nvfp4_emulation_utils

    x = values()
    codes, scales = mxfp8_utils._mxfp8_e4m3_quantize_torch(x)
    theirs = codes.float() * torch.exp2(scales.float() - 127).repeat_interleave(32, dim=1)
    assert torch.equal(quantised.mxfp8(x), theirs)
    whole = 448 * 6 / x.abs().amax()
    codes, scales = nvfp4_emulation_utils.ref_nvfp4_quant(x, whole, 16)
    theirs = codes.unflatten(1, (-1, 16)) * (scales / whole).reshape(len(x), -1, 1)
    torch.testing.assert_close(quantised.nvfp4(x), theirs.flatten(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_stored_once_is_stored_the_same_again(name):
    """Rounding twice is rounding once, sizes that fill no group included, and 16-bit values stay 16-bit ones."""
    x = values(33, 100)
    for faked in (lambda x: FORMATS[name].weights(x, None), FORMATS[name].activations):
        torch.testing.assert_close(faked(faked(x)), faked(x), rtol=1e-6, atol=0)
        assert not torch.equal(faked(x), x) and not faked(torch.zeros(5, 100)).any()
        assert faked(x.bfloat16()).dtype == torch.bfloat16
        assert faked(torch.full((2, 32), float("nan"))).isnan().all()


def test_finer_scales_leave_smaller_errors():
    """Rows of very different size: a scale a row or a group is better than one a tensor, 8 bits are better than 4."""
    x = values() * torch.logspace(-4, 2, 96)[:, None]
    error = {
        name: float((f.activations(x) - x).norm(dim=1).div(x.norm(dim=1) + 1e-12).mean()) for name, f in FORMATS.items()
    }
    assert error["fp8_tensor"] > 2 * max(error["fp8_channel"], error["fp8_block"], error["mxfp8"])
    assert error["nvfp4"] > 2 * error["fp8_channel"]


# The network


class Faked(nn.Module):
    """A linear layer of a quantised model, written out: float64 products of what the format stores."""

    def __init__(self, linear, weight, activations):
        super().__init__()
        self.weight_OI, self.bias, self.activations = weight.double(), linear.bias, activations

    def forward(self, x):
        given = self.activations(x) if self.activations else x
        return (given.double() @ self.weight_OI.t()).float()


def written_out(name: str, *, weights: bool, activations: bool) -> nn.Module:
    """The tiny model with every linear layer of its body replaced."""
    network, form = parts.model(), FORMATS[name]
    for layer in network.model.layers:
        for parent, names in ((layer.self_attn, ("q_proj", "k_proj", "v_proj")), (layer.self_attn, ("o_proj",)),
                              (layer.mlp, ("gate_proj", "up_proj")), (layer.mlp, ("down_proj",))):  # fmt: skip
            amax = max(float(getattr(parent, n).weight.abs().max()) for n in names)
            for n in names:
                linear = getattr(parent, n)
                stored = form.weights(linear.weight.detach(), torch.tensor(amax)) if weights else linear.weight.detach()
                setattr(parent, n, Faked(linear, stored, form.activations if activations else None))
    return network


@torch.no_grad()
@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_body_is_the_one_written_out(name):
    ids = parts.batch(1).token_ids_BL
    for weights, activations in ((True, False), (False, True), (True, True)):
        network = parts.model()
        before = {n: p.detach().clone() for n, p in network.named_parameters()}
        plain = network(ids).logits
        with fake_quantised(network, Recipe(weights=name * weights, activations=name * activations)):
            found = network(ids).logits
        theirs = written_out(name, weights=weights, activations=activations)(ids).logits
        # one value that lies between two codes may be rounded to either, so a few positions may differ by that much
        assert (found - theirs).abs().median() < 1e-5 < (found - plain).abs().median()
        assert all(torch.equal(p, before[n]) for n, p in network.named_parameters())
        assert torch.equal(network(ids).logits, plain), "nothing is left behind"


class Quantised(DynamicCache):
    """transformers' own cache, which stores keys and values in a format."""

    faked = None

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return super().update(self.faked(key_states), self.faked(value_states), layer_idx, *args, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("name", KV_FORMATS)
def test_quantised_keys_and_values_are_what_decoding_from_a_quantised_cache_gives(name):
    network, ids = parts.model(), parts.batch(1).token_ids_BL
    with fake_quantised(network, Recipe(kv=name)):
        found = network(ids).logits
    cache = Quantised(config=network.config)
    cache.faked = KV_FORMATS[name]
    decoded = torch.cat([network(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])], 1)
    torch.testing.assert_close(found, decoded, rtol=1e-4, atol=1e-5)
    assert (found - network(ids).logits).abs().max() > 1e-3


@torch.no_grad()
def test_only_the_chosen_layers_are_quantised():
    network, ids = parts.model(), parts.batch(1).token_ids_BL
    states = network(ids, output_hidden_states=True).hidden_states
    recipe = Recipe("fp8_tensor", "fp8_tensor", "fp8", frozenset({1}))
    with fake_quantised(network, recipe):
        found = network(ids, output_hidden_states=True).hidden_states
    assert torch.equal(found[1], states[1]) and not torch.equal(found[2], states[2])


def test_gradients_go_straight_through_and_the_head_stays_plain():
    """The gradient is the one of the stored weights at the stored inputs; the head's that of its own weight."""
    network, ids = parts.model(), parts.batch(1).token_ids_BL
    with fake_quantised(network, Recipe("fp8_block", "fp8_block", "fp8")):
        states = network.model(ids).last_hidden_state
        network(ids).logits.square().mean().backward()
    found = network.model.layers[0].mlp.down_proj.weight.grad
    assert found.isfinite().all() and found.abs().max() > 0
    logits = states.detach().double() @ network.lm_head.weight.detach().double().t()
    theirs = (2 * logits / logits.numel())[0].t() @ states.detach()[0].double()
    torch.testing.assert_close(network.lm_head.weight.grad.double(), theirs, rtol=1e-4, atol=1e-7)


def test_what_cannot_be_faked_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="quantised weights: unknown format 'int3'; choose one of fp8_tensor"):
        Recipe(weights="int3")
    with pytest.raises(ValueError, match="quantised kv: unknown format 'mxfp8'; choose one of fp8, fp8_towards"):
        Recipe(kv="mxfp8")
    experts = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=1, num_experts=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts_per_tok=2,
        )
    )  # fmt: skip
    with (
        pytest.raises(ValueError, match="experts.* are no linear layers .stacked experts"),
        fake_quantised(experts, Recipe("fp8_block")),
    ):
        pass
    network = parts.model()
    monkeypatch.setattr(quantised, "heads_changed", lambda network, change: torch.no_grad())  # an attention of its own
    with (
        pytest.raises(RuntimeError, match="keys and values were not quantised"),
        fake_quantised(network, Recipe(kv="fp8")),
    ):
        network(torch.tensor([[1, 2, 3]]))


# The budget


@torch.no_grad()
def test_expectations_are_those_of_the_whole_vocabulary_and_of_sampled_tokens():
    network, batch = parts.model(), parts.batch()
    batch = replace(batch, spec=replace(batch.spec, temperature=0.8))
    found = measure(network, batch, format="fp8_tensor", by_layer=False)
    plain, other = [], []
    for i in range(len(batch)):
        ids = batch.token_ids_BL[i][batch.attention_mask_BL[i]][None]
        at = batch.loss_mask_BL[i][batch.attention_mask_BL[i]].nonzero()[:, 0] - 1
        plain.append((network(ids).logits[0, at].double() / 0.8).log_softmax(-1))
        with fake_quantised(network, Recipe("fp8_tensor", "fp8_tensor")):
            other.append((network(ids).logits[0, at].double() / 0.8).log_softmax(-1))
    old_NV, rollout_NV = torch.cat(plain), torch.cat(other)
    p_NV = rollout_NV.exp()
    assert found.tokens == len(old_NV) == 48
    assert found.together.k3 == pytest.approx(float((p_NV * (rollout_NV - old_NV)).sum(1).mean()), rel=1e-5)
    assert found.together.chi2 == pytest.approx(float(((2 * old_NV - rollout_NV).exp().sum(1) - 1).mean()), rel=1e-5)
    assert found.together.moved == pytest.approx(float((p_NV - old_NV.exp()).abs().sum(1).mean() / 2), rel=1e-5)
    truncated = p_NV * ((old_NV - rollout_NV).exp() - 2).clamp(min=0)
    assert found.together.uncorrected["tis"] == pytest.approx(float(truncated.sum(1).mean()), rel=1e-3, abs=1e-9)
    drawn_NK = torch.multinomial(p_NV, 4000, replacement=True, generator=torch.Generator().manual_seed(0))
    sampled = mismatch.compare(
        old_NV.gather(1, drawn_NK), rollout_NV.gather(1, drawn_NK), torch.ones_like(drawn_NK) > 0
    )
    spread = float((old_NV - rollout_NV).expm1().sub(old_NV - rollout_NV).square().mul(p_NV).sum(1).mean() ** 0.5)
    assert abs(sampled["k3"] - found.together.k3) < 6 * spread / drawn_NK.numel() ** 0.5


def test_shares_add_up_and_every_layer_is_there_once():
    found = measure(parts.model(), parts.batch(3), format="fp8_channel", kv="fp8")
    assert sum(found.share.values()) == pytest.approx(found.together.k3, rel=1e-9)
    assert set(found.share) == set(found.alone) == {"weights", "activations", "kv"}
    assert len(found.layers) == parts.LAYERS and all(min(layer.values()) > 0 for layer in found.layers)
    plain = measure(parts.model(), parts.batch(3), format="fp8_channel", by_layer=False)
    assert set(plain.share) == {"weights", "activations"} and plain.together.k3 < found.together.k3
    assert plain.alone["weights"].k3 == found.alone["weights"].k3
    assert "lm_head: plain, float32" in budget.text(found) and "layer   0" in budget.text(found)


def test_two_components_that_do_not_interact_share_as_they_are_alone():
    k3 = {frozenset("a"): 1.0, frozenset("b"): 3.0, frozenset("ab"): 4.0}
    assert budget._shapley(k3, "ab") == {"a": 1.0, "b": 3.0}
    assert budget._shapley(k3 | {frozenset("ab"): 6.0}, "ab") == {"a": 2.0, "b": 4.0}, "what they do together is halved"


def test_a_body_in_16_bits_has_a_rounding_and_is_unchanged_afterwards():
    network = parts.model().bfloat16()
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    found = measure(network, parts.batch(3), format="fp8_channel", by_layer=False)
    assert 1e-7 < found.rounding_k3 < found.together.k3 and found.advice[0]
    assert all(torch.equal(p, before[n]) and p.dtype == torch.bfloat16 for n, p in network.named_parameters())


def test_a_quantised_head_does_not_pass_for_a_plain_one():
    network, form = parts.model(), FORMATS["fp8_channel"]
    stored = form.weights(network.lm_head.weight.detach(), None)
    network.lm_head.forward = lambda hidden: nn.functional.linear(form.activations(hidden), stored)
    with pytest.raises(RuntimeError, match="head is not plain: none of float32, bfloat16, float16"):
        measure(network, parts.batch(2), format="fp8_channel", by_layer=False)


def test_logits_that_are_not_finite_are_an_error_and_so_is_nothing_to_measure():
    network, batch = parts.model(), parts.batch(2)
    with pytest.raises(ValueError, match="loss mask is empty"):
        measure(network, replace(batch, loss_mask_BL=torch.zeros_like(batch.loss_mask_BL)), format="mxfp8")
    network.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="not finite"):
        measure(network, batch, format="mxfp8", by_layer=False)


def judged(k3: float, **given: tuple[float, float]) -> Budget:
    """given: preset = (uncorrected, ess)."""
    found = Divergence(
        k3=k3, chi2=0.1, moved=0.1, uncorrected={n: u for n, (u, _) in given.items()}, ess={n: e for n, (_, e) in given.items()}
    )  # fmt: skip
    return Budget(
        model="m", format="mxfp8", kv="", tokens=1, temperature=1.0, rounding_k3=1e-4, together=found, alone={}, share={},
        layers=[], quantised_head=0.0, head=Multiplied(dtype="float32"),
    )  # fmt: skip


def test_the_advice():
    tight = {"tis": (1e-3, 0.99), "icepop": (1e-2, 0.99), "kpop": (1e-4, 0.90)}
    assert judged(1e-4, **tight).advice[0] == "", "rounding does as much"
    assert judged(1e-2, **tight).advice[0] == "tis", "kpop leaves less, but its weights lose their sample size"
    assert judged(1e-2, **tight | {"kpop": (1e-4, 0.96)}).advice[0] == "kpop"
    assert judged(1e-2, **dict.fromkeys(tight, (1e-3, 0.9))).advice[0] == "ess_tis"


def test_the_command_refuses_what_it_does_not_know(capsys):
    assert main(["attribute", "--kv-cache", "fp8"]) == 2
    assert "name the body's format too, with --budget" in capsys.readouterr().err
    assert main(["attribute", "--budget", "int3"]) == 2
    assert "unknown format 'int3'" in capsys.readouterr().err
