"""The dtype that logits were multiplied in, told from their values."""

import pytest
import torch

from rlalign.head import multiplied, projection
from rlalign.head.transform import HeadTransform

N, D, V = 4, 96, 700


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).bfloat16()
    return hidden, (torch.randn(V, D, generator=generator) * 0.3).bfloat16()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_each_dtype_is_told_from_the_others(operands, scale):
    hidden, weight = operands[0], (operands[1].float() * scale).bfloat16()
    wide = projection.project(hidden, weight)
    assert multiplied.of_logits(wide, hidden, weight).dtype == "float32"
    for name in ("bfloat16", "float16"):
        if name == "bfloat16" or scale == 1.0:  # the range of float16 ends elsewhere
            rounded = wide.to(getattr(torch, name))
            assert multiplied.of_logits(rounded, hidden, weight).dtype == name
            assert multiplied.of_logits(rounded.float(), hidden, weight).dtype == name
    coarse = hidden.float() @ weight.float().to(torch.float8_e4m3fn).float().t()
    assert multiplied.of_logits(coarse, hidden, weight).dtype in (multiplied.OTHER, None)


def test_a_bias_is_part_of_the_product_and_another_weight_is_none(operands):
    hidden, weight = operands
    bias = torch.randn(V, generator=torch.Generator().manual_seed(1))
    logits = projection.project(hidden, weight, bias)
    assert multiplied.of_logits(logits, hidden, weight, bias).dtype == "float32"
    assert multiplied.of_logits(logits, hidden, weight).dtype == multiplied.OTHER
    assert multiplied.of_logits(logits, hidden, weight.roll(1, 0), bias).dtype == multiplied.OTHER


@pytest.mark.parametrize("hidden", [torch.zeros(N, D), torch.full((N, D), float("nan"))])
def test_what_tells_nothing_is_not_judged(operands, hidden):
    found = multiplied.of_logits(hidden @ operands[1].float().t(), hidden, operands[1])
    assert found.dtype is None and found.why


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_logprobs_tell_it_where_logits_are_never_shown(operands, cap, temperature):
    hidden, weight = operands
    transform = HeadTransform(cap=cap)
    ids = torch.tensor([3, 99, 500, 650])
    wide = projection.project(hidden, weight)

    def given(logits):
        return (transform.apply(logits).float() / temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0]

    about = {"bias_V": None, "transform": transform.apply, "temperature": temperature}
    assert multiplied.of_logprobs(given(wide), hidden, weight, ids, **about).dtype == "float32"
    assert multiplied.of_logprobs(given(wide.bfloat16()), hidden, weight, ids, **about).dtype == "bfloat16"


@pytest.mark.parametrize("sharpness", [14.0, 18.0, 20.0, 24.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_that_is_nearly_sure_is_not_taken_for_another_dtype(sharpness, dtype):
    """A logprob of -1e-4 is the difference of logits of 20: float32's own error is 1e-6, not 1e-11."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(500, 64, generator=generator) / 8
        ids = torch.arange(12)
        hidden = weight[ids] / weight[ids].norm(dim=1, keepdim=True) * sharpness
        hidden = (hidden + 0.1 * torch.randn(12, 64, generator=generator)).to(dtype)
        wide = projection.project(hidden, weight.to(dtype))
        logprobs = wide.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
        about = {"bias_V": None, "transform": HeadTransform().apply, "temperature": 1.0}
        found = multiplied.of_logprobs(logprobs, hidden, weight.to(dtype), ids, **about)
        assert found.dtype in (None, "float32"), found
