"""Products of 16 bits, widened: one rounding each, forward and backward, wherever in a model they come from."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from rlalign.head import kernel, products, steady, widened
from rlalign.head.widened import NATIVE, WIDENED, Choice
from rlalign.trainer import attention as attentions
from tests.kernel_parts import forget, needs_compiler

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit in the last place, relative
TINIEST = {torch.bfloat16: 0.0, torch.float16: 2.0**-25}
DTYPES = pytest.mark.parametrize("dtype", ROUNDING, ids=("bf16", "fp16"))
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "attn_implementation": "eager"},
    "gpt2": {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },  # Conv1D instead of linear layers
    "qwen3_moe": {
        "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    },
}  # fmt: skip


def normal(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_rounded_once(found, exact, size):
    """size: the sum of the absolute values of what was added up, for the float32 additions."""
    limit = ROUNDING[found.dtype] * exact.abs() + 2.0**-19 * size + TINIEST[found.dtype]
    assert bool(((found.double() - exact).abs() <= limit).all())


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (2, 33), (1, 1)])
def test_a_linear_layer_and_its_gradients_are_rounded_once(dtype, bias, shape):
    x = normal(*shape, 96, dtype=dtype, seed=0).requires_grad_()
    w = normal(40, 96, dtype=dtype, seed=1).requires_grad_()
    b = normal(40, dtype=dtype, seed=2).requires_grad_() if bias else None
    grad = normal(*shape, 40, dtype=dtype, seed=3)
    with widened.using(WIDENED):
        y = F.linear(x, w, b)
        y.backward(grad)
    wide = [t.detach().double() for t in (x.flatten(0, -2), w, grad.flatten(0, -2))]
    (x64, w64, g64), plus = wide, (0.0 if b is None else b.detach().double())
    size = x64.abs() @ w64.abs().t() + abs(plus)
    assert_rounded_once(y.detach().flatten(0, -2), x64 @ w64.t() + plus, size)
    assert_rounded_once(x.grad.flatten(0, -2), g64 @ w64, g64.abs() @ w64.abs())
    assert_rounded_once(w.grad, g64.t() @ x64, g64.abs().t() @ x64.abs())


@needs_compiler
@pytest.mark.parametrize("bias", [False, True])
def test_a_bf16_linear_layer_has_the_bits_of_the_kernel_for_any_number_of_rows(compiled, monkeypatch, bias):
    monkeypatch.setenv("RLALIGN_CACHE", str(compiled))
    forget()
    x, w = normal(70, 300, dtype=torch.bfloat16, seed=0), normal(40, 300, dtype=torch.bfloat16, seed=1)
    b = normal(40, dtype=torch.bfloat16, seed=2) if bias else None
    with widened.using(WIDENED):
        whole = F.linear(x, w, b)
        assert all(torch.equal(F.linear(x[:n], w, b), whole[:n]) for n in (1, 2, 5, 16, 33, 69))
        assert torch.equal(F.linear(x[None], w, b)[0], whole)
        strided = F.linear(x[:, ::2], w[:, ::2], b)  # rows that do not lie whole
    logits = kernel.fma()(x, w, torch.empty(70, 40))
    assert torch.equal(whole, (logits if b is None else logits + b.float()).bfloat16())
    half = x[:, ::2].double() @ w[:, ::2].double().t() + (0.0 if b is None else b.double())
    assert_rounded_once(strided, half, x.double().abs() @ w.double().abs().t() + 3.0)
    forget()


@DTYPES
def test_every_product_of_torch_is_widened(dtype):
    a, b, c = (normal(*s, dtype=dtype, seed=i) for i, s in enumerate([(3, 20, 24), (3, 24, 28), (3, 20, 28)]))
    wide = [x.double() for x in (a, b, c)]
    exact, size = torch.bmm(wide[0], wide[1]), torch.bmm(wide[0].abs(), wide[1].abs())
    with widened.using(WIDENED):
        assert_rounded_once(torch.bmm(a, b), exact, size)
        assert_rounded_once(torch.einsum("bij,bjk->bik", a, b), exact, size)
        assert_rounded_once(torch.baddbmm(c, a, b), exact + wide[2], size + wide[2].abs())
        assert_rounded_once(a[0] @ b[0], exact[0], size[0])
        assert_rounded_once(
            torch.addmm(c[0], a[0], b[0], beta=0.5, alpha=2.0),
            2 * exact[0] + wide[2][0] / 2,
            2 * size[0] + wide[2][0].abs(),
        )
        out = torch.empty(0, dtype=dtype)
        assert torch.mm(a[0], b[0], out=out) is out and torch.equal(out, a[0] @ b[0])
        layer = Conv1D(28, 24).to(dtype)
        layer.weight.data.copy_(b[0])
        assert_rounded_once(
            layer(a).detach(), torch.einsum("bij,jk->bik", wide[0], wide[1][0]), size.abs().amax().expand_as(c)
        )
        with pytest.raises(RuntimeError, match="same dtype"):
            torch.mm(a[0], b[0].float())


@DTYPES
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_as_good_as_float32_attention_rounded(dtype, masked):
    query, key, value, grad = (normal(2, 4, 37, 16, dtype=dtype, seed=i) for i in range(4))
    mask = torch.ones(37, 37, dtype=torch.bool).tril() & ~torch.ones(37, 37, dtype=torch.bool).tril(-9)
    how = {"attn_mask": mask} if masked else {"is_causal": True}

    def run(dtype):
        given = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        found = F.scaled_dot_product_attention(*given, **how)
        return [found.detach(), *torch.autograd.grad(found, given, grad.to(dtype))]

    exact = run(torch.float64)
    with widened.using(WIDENED):
        found = run(dtype)
    for mine, right in zip(found, exact, strict=True):
        error = (mine.double() - right).abs()
        # The gradient's second rounding is that of the output it is given: half a unit of what is summed up over E.
        assert bool((error <= ROUNDING[dtype] * (right.abs() + right.abs().amax()) + 1e-6).all())
        assert float(error.mean()) < ROUNDING[dtype] * float(right.abs().mean())


def gradients(network, ids):
    network.zero_grad()
    hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
    (hidden.double() * normal(*hidden.shape, dtype=torch.float64, seed=9)).sum().backward()
    return torch.cat([p.grad.flatten().double() for p in network.base_model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
def test_models_get_gradients_as_good_as_torchs_own(family):
    """Against the same bf16 weights in float64; sdpa, eager attention with a soft cap, Conv1D, mixtures of experts."""
    torch.manual_seed(0)
    more = dict(FAMILIES[family])
    attention = more.pop("attn_implementation", None)
    config = AutoConfig.for_model(family, **(SMALL | more))
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention).eval()
    if family == "qwen3_moe":
        network.set_experts_implementation("eager")
    attentions.install(network)
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    exact = gradients(copy.deepcopy(network).double(), ids)
    with widened.using(NATIVE):
        native = gradients(network, ids)
    with widened.using(WIDENED):
        mine = gradients(network, ids)
        network.gradient_checkpointing_enable({"use_reentrant": False})
        network.train()
        assert torch.equal(gradients(network, ids), mine)
    assert float((mine - exact).norm()) <= 1.5 * float((native - exact).norm())


def test_float32_and_float64_products_keep_their_bits():
    for dtype in (torch.float32, torch.float64):
        a, b = (torch.randn(33, 33, dtype=dtype) for _ in range(2))
        with widened.using(NATIVE):
            before = a @ b
        with widened.using(WIDENED):
            assert torch.equal(a @ b, before)


def choice_of(products, *, why="measured", host=None):
    return Choice("bfloat16", products, why, 2.0, 1.0, host or widened.host())


@pytest.fixture
def undecided(monkeypatch):
    monkeypatch.setattr(widened, "_choices", {})
    monkeypatch.delenv(widened.VARIABLE, raising=False)
    with widened.using(NATIVE):
        yield


@pytest.mark.parametrize(("native_ms", "products"), [(1.9, NATIVE), (2.1, WIDENED)])
def test_the_faster_way_by_a_factor_of_two_is_taken_once(undecided, monkeypatch, native_ms, products):
    monkeypatch.setattr(widened, "_measured", lambda dtype: (native_ms, 1.0))
    choice = widened.decide(torch.bfloat16)
    assert (choice.products, choice.why) == (products, "measured")
    assert f"torch's own took {native_ms:.2f} ms, widened to float32 1.00 ms" in choice.describe()
    monkeypatch.setattr(widened, "_measured", lambda dtype: (100.0, 1.0))
    assert widened.decide(torch.bfloat16) is choice and widened.state()[0]["products"] == products
    assert widened.is_widened(torch.bfloat16) == (products == WIDENED)
    assert widened.environment() == {widened.VARIABLE: products}


def test_other_dtypes_are_never_touched(undecided):
    assert widened.decide(torch.float32) is None and widened.decide_for(torch.nn.Linear(2, 2)) is None


def test_the_variable_decides_and_a_wrong_one_is_refused(undecided, monkeypatch):
    monkeypatch.setenv(widened.VARIABLE, "fast")
    with pytest.raises(ValueError, match="RLALIGN_CPU_PRODUCTS='fast': choose native or widened"):
        widened.decide(torch.bfloat16)
    monkeypatch.setenv(widened.VARIABLE, WIDENED)
    choice = widened.decide(torch.bfloat16)
    assert (choice.products, choice.why, choice.native_ms) == (WIDENED, widened.VARIABLE, None)


def test_a_resumed_run_computes_as_its_checkpoint_did(undecided, monkeypatch):
    monkeypatch.setattr(widened, "_measured", lambda dtype: (1.0, 1.0))
    kept = [{"dtype": "bfloat16", "products": WIDENED, "host": "another processor"}]
    widened.resume(kept)
    assert not widened.is_widened(torch.bfloat16)
    widened.resume([kept[0] | {"host": widened.host()}])
    assert widened.is_widened(torch.bfloat16) and widened.state()[0]["why"] == "as in the checkpoint"


def test_one_rank_that_needs_it_decides_for_all(undecided, monkeypatch):
    monkeypatch.setattr(widened, "_measured", lambda dtype: (1.0, 1.0))
    monkeypatch.setattr(widened.ranks, "world_size", lambda: 2)
    monkeypatch.setattr(widened.ranks, "any_of", lambda flag, device: True)
    assert widened.decide_together(torch.bfloat16).why == "another rank needs it"
    assert widened.is_widened(torch.bfloat16)


@pytest.mark.slow
def test_where_torchs_own_are_kept_torchs_kernels_stay():
    code = "import torch; from rlalign.head import widened; widened.decide(torch.bfloat16); print(widened._library)"
    environment = os.environ | {widened.VARIABLE: NATIVE}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.strip() == "[]"


def test_the_measurement_is_one_threads_whatever_the_process_has(monkeypatch):
    own, seen, threads = torch.mm, set(), torch.get_num_threads()
    monkeypatch.setattr(torch, "mm", lambda a, b: (seen.add(torch.get_num_threads()), own(a, b))[1])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # as vLLM's CPU worker leaves it
    torch._C.set_num_threads(2)
    try:
        widened._measured(torch.bfloat16)
        assert seen == {1} and torch.get_num_threads() == 2
    finally:
        torch._C.set_num_threads(threads)


def test_a_host_without_instructions_is_not_asked_for_mkls_imitation(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(products, "_mkl_symbol", lambda: pytest.fail("asked"))
    with widened.using(NATIVE):
        assert "without instructions for them" in steady.missing(torch.bfloat16)
