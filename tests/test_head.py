"""Laws of head.project: exact products, float32 accumulation, bits that do not depend on the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.head import projection
from rlalign.head.products import Route, logits_of, stored_for


def operands(n: int, d: int, v: int, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g).to(dtype)
    return hidden, (0.5 * torch.randn(v, d, generator=g)).to(dtype), torch.randn(v, generator=g).to(dtype)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", projection.FLOATS)
def test_project_is_close_to_float64_and_the_models_own_head_is_not(dtype: torch.dtype) -> None:
    hidden, weight, bias = operands(40, 512, 3000, dtype=dtype)
    exact = hidden.double() @ weight.double().t() + bias.double()
    bound = 2.0**-20 * (hidden.double().abs() @ weight.double().abs().t() + bias.double().abs())
    assert ((projection.project(hidden, weight, bias) - exact).abs() <= bound).all()
    if dtype != torch.float32:
        rounded = F.linear(hidden, weight, bias).float()
        assert (rounded - exact).abs().max() > 100 * (projection.project(hidden, weight, bias) - exact).abs().max()


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 300),
    d=st.sampled_from([8, 64, 256, 1000]),
    v=st.sampled_from([2, 33, 1000, 2049]),
    dtype=st.sampled_from(projection.FLOATS),
    seed=st.integers(0, 99),
)
def test_rows_and_vocabulary_slices_do_not_change_a_bit(n: int, d: int, v: int, dtype: torch.dtype, seed: int) -> None:
    hidden, weight, _ = operands(300, d, v, dtype=dtype, seed=seed)
    whole = projection.project(hidden, weight)
    first = seed % (301 - n)
    assert torch.equal(projection.project(hidden[first : first + n], weight), whole[first : first + n])
    assert torch.equal(projection.project(hidden[:n], weight[v // 2 :]), whole[:n, v // 2 :])


def test_decode_batches_and_training_batches_give_equal_bits() -> None:
    hidden, weight, bias = operands(4096, 256, 2000)
    training = projection.project(hidden.view(8, 512, 256), weight, bias).view(4096, 2000)
    for n in (1, 8, 64, 256):
        assert torch.equal(projection.project(hidden[-n:], weight, bias), training[-n:])


@pytest.mark.parametrize("n", [1, 2, 8, 64, 700])
def test_float32_copy_of_the_weight_carries_the_weights_bits(n: int) -> None:
    hidden, weight, _ = operands(n, 256, 3000)
    copy = weight.float()
    if projection.route(hidden, weight) is Route.MKL_BF16:
        assert projection.route(hidden, copy, weight_is_bf16_valued=True) is Route.ONEDNN_BF16
    else:
        assert projection.route(hidden, copy, weight_is_bf16_valued=True) is projection.route(hidden, weight)
    assert torch.equal(projection.project(hidden, copy, weight_is_bf16_valued=True), projection.project(hidden, weight))


def test_mkl_is_taken_only_where_its_bits_are_those_of_a_float32_copy() -> None:
    hidden, weight, _ = operands(65, 320, 1500)
    chosen = projection.route(hidden, weight)
    copied = Route.ONEDNN_BF16 if chosen is Route.MKL_BF16 else chosen
    of_copy = logits_of(stored_for(hidden, copied).float(), weight.float(), copied)
    assert torch.equal(projection.project(hidden, weight), of_copy)


def test_unrounded_weight_is_multiplied_unrounded() -> None:
    hidden, _, _ = operands(20, 256, 10)
    master = torch.randn(700, 256, generator=torch.Generator().manual_seed(3))
    exact = hidden.double() @ master.double().t()
    assert projection.route(hidden, master) in (Route.KERNEL_FMA, Route.BLOCKED_FP32), "float32 rows are invariant too"
    assert relative_error(projection.project(hidden, master), exact) < 1e-6
    assert relative_error(projection.project(hidden, master.bfloat16()), exact) > 1e-3


def test_the_users_global_switch_neither_leaks_in_nor_is_left_changed() -> None:
    hidden, weight, _ = operands(64, 256, 1000, dtype=torch.float32)
    plain = projection.project(hidden, weight)
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    try:
        switch.fp32_precision = "bf16"
        assert torch.equal(projection.project(hidden, weight), plain)
        assert switch.fp32_precision == "bf16"
    finally:
        switch.fp32_precision = before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(projection.project(hidden, weight), plain)
        assert projection.project(hidden.bfloat16(), weight.bfloat16()).dtype == torch.float32
    assert switch.fp32_precision == before


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
def test_gradients_match_float64(dtype: torch.dtype, bound: float) -> None:
    leaves = [x.requires_grad_() for x in operands(50, 64, 900, dtype=dtype)]
    upstream = torch.randn(50, 900, generator=torch.Generator().manual_seed(1))
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    exact = torch.autograd.grad(doubles[0] @ doubles[1].t() + doubles[2], doubles, upstream.double())
    for leaf, got, want in zip(
        leaves, torch.autograd.grad(projection.project(*leaves), leaves, upstream), exact, strict=True
    ):
        assert got.dtype == leaf.dtype
        assert relative_error(got, want) < bound


def test_frozen_operands_get_no_gradient() -> None:
    hidden, weight, _ = operands(5, 64, 300)
    projection.project(hidden.requires_grad_(), weight).sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_compiled_caller_gives_the_same_bits_without_a_graph_break(compiling) -> None:
    hidden, weight, bias = operands(9, 64, 500)
    compiled = torch.compile(lambda h, w, b: projection.project(h, w, b) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, weight, bias), projection.project(hidden, weight, bias) * 2)


def test_no_tokens_give_no_logits() -> None:
    _, weight, _ = operands(1, 64, 300)
    assert projection.project(torch.empty(0, 64, dtype=torch.bfloat16), weight).shape == (0, 300)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w, b: (h[:, :32], w, b), "expected hidden"),
        (lambda h, w, b: (h, w[0], b), "expected hidden"),
        (lambda h, w, b: (h, w, b[:5]), "expected a bias"),
        (lambda h, w, b: (h.double(), w, b), "hidden must be float32"),
        (lambda h, w, b: (h, w.to(torch.int8), b), "weight must be float32"),
        (lambda h, w, b: (h, w.to("meta"), b), "meta device"),
        (lambda h, w, b: (h, w.new_empty(0), b), "ZeRO-3"),
        (lambda h, w, b: (h.to("meta"), w, b), "weight is on cpu"),
    ],
)
def test_bad_operands_are_named(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        projection.project(*change(*operands(4, 64, 300)))
