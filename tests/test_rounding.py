"""A mirrored body computes the same function, rounded elsewhere: values against float32, gradients against float64."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn import functional

from rlalign.head import steady, widened
from rlalign.trainer.network import load
from rlalign.trainer.rounding import mirroring, variants
from rlalign.trainer.rounding.mirroring import KNOWN, BodyPlan, Choices, mirror_body, unmirror_body
from rlalign.trainer.rounding.probing import OpDifference, Probed
from rlalign.trainer.rounding.variants import ENGINE_KERNEL, MODEL, ONE_ORDER, ROUNDED_ONCE, SUM_ROUNDED_LATE

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATE = Choices(add_and_norm=SUM_ROUNDED_LATE, rope=ROUNDED_ONCE)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def network(name: str, dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))
    kind = getattr(transformers, "Gemma3TextConfig" if name.startswith("Gemma3") else config.__name__)
    built = getattr(transformers, name)(kind(**SIZES, **({"residual_multiplier": 0.5} if "Granite" in name else {})))
    for parameter in built.parameters():  # norms of ones and biases of zeros would hide what they are for
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return built.to(dtype).eval()


def reference_kernel(query, key, value, lengths, *, scale, window, soft_cap):
    """Attention in float64, sequence by sequence."""
    found = []
    for q, k, v in zip(*(x.double().split(list(lengths)) for x in (query, key, value)), strict=True):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("the,she->hts", q, k) * scale
        scores = soft_cap * (scores / soft_cap).tanh() if soft_cap else scores
        at = torch.arange(len(q))
        hidden = (at[None] > at[:, None]) | (at[:, None] - at[None] >= (window or len(q)))
        found.append(torch.einsum("hts,she->the", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(found).to(query.dtype)


REFERENCE = SimpleNamespace(attend=reference_kernel, multiply=functional.linear)


def relative(a, b) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def gradients(function, *given):
    given = [x.detach().requires_grad_() for x in given]
    found = function(*given)
    return torch.autograd.grad((found.double() * normal(*found.shape, seed=8).double()).sum(), given)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("weight_wide", [False, True])
def test_a_norm_of_the_unrounded_sum_has_the_gradient_of_the_float64_op(offset, weight_wide):
    residual, branch, weight = (
        normal(*s, seed=i, dtype=torch.bfloat16) for i, s in enumerate([(9, 64), (9, 64), (64,)])
    )

    def mirrored(r, b, w):
        return variants.norm(variants.added(r, b)[1], w, 1e-5, offset=offset, weight_wide=weight_wide)

    def exact(r, b, w):
        total = r + b
        return total * (total.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * (1 + w if offset else w)

    wide = [x.double() for x in (residual, branch, weight)]
    assert relative(mirrored(residual, branch, weight), exact(*wide)) < 2**-8
    for got, expected in zip(gradients(mirrored, residual, branch, weight), gradients(exact, *wide), strict=True):
        assert relative(got, expected) < 2**-7


def test_a_norm_has_the_same_bits_a_few_rows_at_a_time(monkeypatch):
    wide, weight = normal(3, 50, 64), normal(64, seed=1, dtype=torch.bfloat16)
    whole, gradient = variants.norm(wide, weight, 1e-5), gradients(lambda x: variants.norm(x, weight, 1e-5), wide)
    monkeypatch.setattr(variants, "ELEMENTS", 7 * 64)
    assert torch.equal(variants.norm(wide, weight, 1e-5), whole)
    assert torch.equal(gradients(lambda x: variants.norm(x, weight, 1e-5), wide)[0], gradient[0])


def test_the_two_forms_of_a_sum_leave_what_was_added_as_it_was():
    for dtype in (torch.bfloat16, torch.float32):
        residual, branch = normal(9, 64, dtype=dtype), normal(9, 64, seed=1, dtype=dtype)
        rounded, wide = variants.added(residual, branch)
        assert torch.equal(residual, normal(9, 64, dtype=dtype)) and wide.dtype == torch.float32
        assert torch.equal(rounded, residual + branch), "rounding the float32 sum is adding in the dtype"
        assert torch.equal(wide.double(), (residual.double() + branch.double()).float().double())


def test_rope_rounded_once_is_float64_rounded_once_and_rounding_thrice_is_not():
    states, angle = normal(2, 3, 50, 16, dtype=torch.bfloat16), normal(50, 16, seed=1)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()

    def exact(x):
        turned = torch.cat((-x[..., 8:], x[..., :8]), dim=-1)
        return x * cos.double() + turned * sin.double()

    once = exact(states.double()).bfloat16()
    assert torch.equal(variants.rotated(states, cos, sin), once)
    assert float((variants.rotated_model(states, cos, sin) != once).double().mean()) > 0.05
    (got,), (expected,) = gradients(lambda x: variants.rotated(x, cos, sin), states), gradients(exact, states.double())
    assert relative(got, expected) < 2**-8


def test_an_activation_rounded_once_is_float64_rounded_once():
    gate, up = normal(40, 64, dtype=torch.bfloat16), normal(40, 64, seed=1, dtype=torch.bfloat16)
    exact = functional.silu(gate.double()) * up.double()
    assert float((variants.activated_once(gate, up, functional.silu) == exact.bfloat16()).double().mean()) > 0.999
    assert float((variants.activated_model(gate, up, functional.silu) == exact.bfloat16()).double().mean()) < 0.95
    got = gradients(lambda g, u: variants.activated_once(g, u, functional.silu), gate, up)
    expected = gradients(lambda g, u: functional.silu(g) * u, gate.double(), up.double())
    assert all(relative(a, b) < 2**-7 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 192), (96, 64)])
def test_a_steady_product_has_the_same_bits_for_any_number_of_rows(inputs, outputs, bias):
    if reason := steady.missing(torch.bfloat16):
        assert "kernel" in reason or "MKL" in reason
        return
    rows, weight = normal(1100, inputs, dtype=torch.bfloat16), normal(outputs, inputs, seed=1, dtype=torch.bfloat16)
    offset = normal(outputs, seed=2, dtype=torch.bfloat16) if bias else None
    whole = steady.linear(rows, weight, offset)
    for n in (1, 2, 4, 5, 31, 33, 64, 200, 512, 800):
        assert torch.equal(steady.linear(rows[:n], weight, offset), whole[:n])
        assert torch.equal(steady.linear(rows[-n:], weight, offset), whole[-n:])
    exact = rows.double() @ weight.double().T + (0 if offset is None else offset.double())
    assert relative(whole, exact) < 2**-8
    got = gradients(lambda x, w: steady.linear(x, w, offset), rows[:70].view(7, 10, -1), weight)
    expected = gradients(functional.linear, rows[:70].view(7, 10, -1).double(), weight.double())
    assert all(relative(a, b) < 2**-7 for a, b in zip(got, expected, strict=True))


def test_pieces_cover_the_rows_in_order(monkeypatch):
    monkeypatch.setattr(steady, "_keeps_order", lambda size, *kind: size != 4096)
    for rows in (1, 32, 33, 700, 800, 1024, 1500, 2048, 5000, 9000):
        found = steady.pieces(rows, 64, 64, False)
        assert sum(n for n, _ in found) == rows
        assert all(size == 0 or n <= size for n, size in found)
        assert all(size != 4096 for _, size in found)


@pytest.fixture
def native():
    """Where bf16 attention is widened, Cohere's own is the reference's, and nothing else of it rounds apart."""
    with widened.using(widened.NATIVE):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_a_mirrored_body_is_as_near_to_float32_as_the_model_and_is_not_the_model(name, native):
    ids = torch.arange(2, 62)[None] % 90
    wide = network(name).float().base_model(ids, use_cache=False).last_hidden_state
    own = network(name).base_model(ids, use_cache=False).last_hidden_state
    mirrored = network(name)
    kinds = Choices(add_and_norm=SUM_ROUNDED_LATE, rope=ROUNDED_ONCE, attention=ENGINE_KERNEL)
    done = mirror_body(mirrored, kinds, kernels=REFERENCE)
    found = mirrored.base_model(ids, use_cache=False).last_hidden_state
    assert done.applied == {"add_and_norm": SUM_ROUNDED_LATE, "rope": ROUNDED_ONCE, "attention": ENGINE_KERNEL}
    assert found.dtype == torch.bfloat16
    assert relative(found, wide) < 1.3 * relative(own, wide)
    assert float((found != own).double().mean()) > 0.1


@torch.no_grad()
def test_a_body_given_back_computes_as_its_class_does():
    ids = torch.arange(2, 62)[None] % 90
    built = network("Gemma3ForCausalLM")
    own, kind = built.base_model(ids, use_cache=False).last_hidden_state, built.config._attn_implementation
    mirror_body(built, Choices(SUM_ROUNDED_LATE, ROUNDED_ONCE, attention=ENGINE_KERNEL), kernels=REFERENCE)
    assert not torch.equal(built.base_model(ids, use_cache=False).last_hidden_state, own)
    unmirror_body(built)
    assert torch.equal(built.base_model(ids, use_cache=False).last_hidden_state, own)
    assert built.config._attn_implementation == kind and mirroring.body_of(built) is None


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_gradients_are_those_of_the_model_with_and_without_checkpointing(name):
    ids = torch.arange(2, 42).view(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0

    def gradient(built, checkpointing=False):
        built.train()
        if checkpointing:
            built.gradient_checkpointing_enable({"use_reentrant": False})
        loss = built(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float().logsumexp(-1).mean()
        loss.backward()
        return torch.cat([p.grad.double().flatten() for p in built.parameters()])

    wide, own, mirrored, again = (network(name) for _ in range(4))
    for built in (mirrored, again):
        mirror_body(built, Choices(SUM_ROUNDED_LATE, ROUNDED_ONCE, attention=ENGINE_KERNEL), kernels=REFERENCE)
    wide_D, own_D, mirrored_D = gradient(wide.float()), gradient(own), gradient(mirrored)
    assert relative(mirrored_D, wide_D) < 1.3 * relative(own_D, wide_D) < 0.1
    assert relative(gradient(again, checkpointing=True), mirrored_D) < 1e-6


def test_packed_sequences_are_those_alone():
    mirrored = network("Qwen3ForCausalLM")
    mirror_body(mirrored, Choices(attention=ENGINE_KERNEL), kernels=REFERENCE)
    parts = [torch.arange(2, 12), torch.arange(30, 47)]
    positions = torch.cat([torch.arange(len(p)) for p in parts])[None]
    ids = torch.cat(parts)[None]
    with torch.no_grad():
        packed = mirrored.base_model(
            ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False, runs=((1, 10), (1, 17))
        ).last_hidden_state[0]
        alone = torch.cat([mirrored.base_model(p[None], use_cache=False).last_hidden_state[0] for p in parts])
    assert relative(packed, alone) < 0.02


def test_what_cannot_be_mirrored_is_refused_or_listed():
    with pytest.raises(ValueError, match=r"rope has no variant 'twice'; choose one of model, rounded_once"):
        Choices(rope="twice")
    with pytest.raises(ValueError, match=r"rounds to bfloat16; this one is torch.float32"):
        mirror_body(network("LlamaForCausalLM", torch.float32), LATE)
    with pytest.raises(ValueError, match="needs the engine's kernels"):
        mirror_body(network("LlamaForCausalLM"), Choices(attention=ENGINE_KERNEL))
    unknown = network("OlmoForCausalLM")
    done = mirror_body(unknown, Choices(SUM_ROUNDED_LATE, ROUNDED_ONCE))
    assert set(done.left) == {"add_and_norm"} and "OlmoForCausalLM are not known" in done.left["add_and_norm"]
    assert done.applied == {"rope": ROUNDED_ONCE}
    assert mirroring.body_of(unknown) is done and "body: add_and_norm as the model has it" in done.describe()[1]
    assert mirror_body(network("LlamaForCausalLM"), Choices()).applied == {}


def test_a_trainer_is_not_given_a_body_that_is_mirrored_in_parts(tmp_path):
    network("OlmoForCausalLM").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"OlmoForCausalLM would be mirrored in parts only \(add_and_norm: the layers of Olmo"
    ):
        load(
            tmp_path, "bfloat16", {"zero_optimization": {"stage": 0}}, checkpointing=False, mirrored=BodyPlan(REFERENCE)
        )


def test_left_padding_and_reentrant_checkpointing_are_refused():
    mirrored = network("LlamaForCausalLM")
    mirror_body(mirrored, Choices(SUM_ROUNDED_LATE, attention=ENGINE_KERNEL), kernels=REFERENCE)
    ids, mask = torch.arange(2, 22).view(2, 10), torch.ones(2, 10, dtype=torch.int64)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="padded on the right"):
        mirrored(ids, attention_mask=mask)
    mirrored.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="reentrant checkpointing loses"):
        mirrored.train()(ids)


def test_every_op_has_the_models_own_rounding_as_its_cheapest_variant():
    for op in variants.OPS:
        found = variants.of(op)
        assert found[0].name == MODEL
        assert [v.cost for v in found] == sorted({v.cost for v in found})
    with pytest.raises(ValueError, match="no variants of an op 'bias'"):
        variants.of("bias")
    assert ONE_ORDER in {v.name for v in variants.of("products")}


@pytest.mark.parametrize("op, model, other, chosen", [
    (variants.ATTENTION, 0, 0, variants.ENGINE_KERNEL),  # a tie over some rows
    (variants.PRODUCTS, 0, 0, variants.ONE_ORDER),
    (variants.ROPE, 0, 0, variants.MODEL),
    (variants.ATTENTION, 0, 3, variants.MODEL),
    (variants.ROPE, 5, 0, variants.ROUNDED_ONCE),
])  # fmt: skip
def test_a_tie_goes_to_the_engines_order_where_an_op_adds_up_and_to_the_cheapest_elsewhere(op, model, other, chosen):
    second = {variants.ATTENTION: variants.ENGINE_KERNEL, variants.PRODUCTS: variants.ONE_ORDER}
    rows = tuple(
        OpDifference(op, "part", "Kind", name, cost, ms=1.0, elements=100, prefill=apart / 100, decode=0.0, apart=apart)
        for cost, (name, apart) in enumerate([(variants.MODEL, model), (second.get(op, variants.ROUNDED_ONCE), other)])
    )
    assert getattr(Probed(rows, {}, tokens=50).choices, op) == chosen


def test_a_truncated_rope_is_the_upper_half_of_the_float32_one_and_has_its_gradient():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, 7, 16, generator=generator).bfloat16()
    cos, sin = (f(torch.randn(7, 8, generator=generator)).bfloat16().repeat(1, 2) for f in (torch.cos, torch.sin))
    x, y = states.double().chunk(2, dim=-1)
    c, s = cos.double()[:, :8], sin.double()[:, :8]
    exact = torch.cat([x * c - y * s, y * c + x * s], dim=-1)
    found = variants.rotated(states, cos, sin, toward_zero=True)
    short = exact.abs() - found.double().abs()
    assert bool((short >= -(2.0**-22) * exact.abs()).all()), "never longer, but for float32's own rounding"
    assert bool((short <= 2.0**-7 * exact.abs() + 1e-30).all()), "by less than a unit in the last place of bfloat16"
    assert 0.3 < float((found != exact.bfloat16()).double().mean()) < 0.7
    along = torch.randn(found.shape, generator=generator).bfloat16()
    grads = []
    for toward_zero in (False, True):
        given = states.clone().requires_grad_()
        variants.rotated(given, cos, sin, toward_zero=toward_zero).backward(along)
        grads.append(given.grad)
    assert torch.equal(*grads)


def test_an_attention_that_rounds_to_nearest_is_left_where_the_engine_truncates():
    unknown = transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, pad_token_id=0, max_position_embeddings=64, original_max_position_embeddings=64,
        )
    ).bfloat16()  # fmt: skip
    done = mirror_body(unknown, Choices(rope=variants.TRUNCATED_ONCE))
    assert "rope" not in done.applied and "rounds to nearest" in done.left["rope"]
