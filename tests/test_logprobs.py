"""Laws of token_logprobs against the written formula in float64 under torch's own autograd."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.head import projection
from rlalign.logprobs import token_logprobs

BOUND = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 2e-3}


@dataclass(frozen=True)
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    token_ids: torch.Tensor

    def leaves(self) -> list[torch.Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def double(self) -> Case:
        cast = [
            None if x is None else x.detach().double().requires_grad_() for x in (self.hidden, self.weight, self.bias)
        ]
        return Case(cast[0], cast[1], cast[2], self.token_ids)


def make(
    batch: int = 3,
    length: int = 12,
    d: int = 16,
    v: int = 90,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    seed: int = 0,
    scale: float = 1.0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
    return Case(
        draw(batch, length, d).to(dtype).requires_grad_(),
        (scale * draw(v, d)).to(dtype).requires_grad_(),
        draw(v).to(dtype).requires_grad_() if bias else None,
        torch.randint(0, v, (batch, length), generator=g),
    )


def formula(case: Case, *, temperature=1.0, soft_cap=None, logit_scale=1.0, vocab_size=None, kept=None):
    """The definition, with everything in memory: logits, soft cap, scale, temperature, log-softmax, gather, shift."""
    logits = case.hidden @ case.weight.t()
    if case.bias is not None:
        logits = logits + case.bias
    logits = logits[..., :vocab_size]
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    if isinstance(temperature, torch.Tensor):
        after = temperature[:, None].expand(case.token_ids.shape) if temperature.dim() == 1 else temperature
        temperature = torch.cat((after[:, 1:], after[:, :1]), 1).unsqueeze(-1)  # of the token that comes next
    logits = logits * logit_scale / temperature
    if kept is not None:
        logits = logits.masked_fill(~allowed(kept, logits), -1e300)  # finite, so that 0 * log 0 is 0 in the entropy
    all_logprobs = logits.log_softmax(-1)
    chosen = all_logprobs[:, :-1].gather(-1, case.token_ids[:, 1:, None])[..., 0]
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)[:, :-1]
    return tuple(torch.nn.functional.pad(x, (1, 0)) for x in (chosen, entropy))


def allowed(kept: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """[B, L, V] whether the token after this position may be v."""
    found = torch.zeros(*kept.shape[:2], logits.shape[-1] + 1, dtype=torch.bool)
    found.scatter_(-1, torch.where(kept < 0, logits.shape[-1], kept), True)
    return torch.cat((found[:, 1:, :-1], found[:, :1, :-1]), 1)


def draw_kept(case: Case, size: int) -> torch.Tensor:
    """A ragged kept set for each token, holding the token itself."""
    g = torch.Generator().manual_seed(7)
    kept = torch.randint(0, 60, (*case.token_ids.shape, size), generator=g)
    kept[torch.rand(kept.shape, generator=g) < 0.4] = -1
    kept[..., size // 2] = case.token_ids
    return kept


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-12)).item()


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(list(BOUND)),
    mode=st.sampled_from(["fast", "exact_mirror"]),
    bias=st.booleans(),
    soft_cap=st.sampled_from([None, 3.0, 30.0]),
    logit_scale=st.sampled_from([1.0, 0.25, -1.5]),
    temperature=st.sampled_from([1.0, 0.6, "sequence", "token"]),
    padding=st.sampled_from([0, 7]),
    chunk=st.sampled_from([None, 1, 5]),
    entropy=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_forward_and_backward_equal_the_formula(
    dtype, mode, bias, soft_cap, logit_scale, temperature, padding, chunk, entropy, seed
) -> None:
    case = make(dtype=dtype, bias=bias, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    if temperature == "sequence":
        temperature = torch.rand(3, generator=g) + 0.5
    elif temperature == "token":
        temperature = torch.rand(3, 12, generator=g) + 0.5
    vocab_size = 90 - padding
    options = {"temperature": temperature, "soft_cap": soft_cap, "logit_scale": logit_scale, "vocab_size": vocab_size}
    case.token_ids.clamp_(max=vocab_size - 1)
    got = token_logprobs(
        case.hidden, case.weight, case.token_ids, bias=case.bias, chunk=chunk, entropy=entropy, mode=mode, **options
    )
    got = got if entropy else (got,)
    double = case.double()
    want = formula(double, **options)[: len(got)]
    upstream = [torch.randn(3, 12, generator=g) for _ in got]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
        assert (a[:, 0] == 0).all()
    grads = torch.autograd.grad(got, case.leaves(), upstream)
    exact = torch.autograd.grad(want, double.leaves(), [u.double() for u in upstream])
    for leaf, a, b in zip(case.leaves(), grads, exact, strict=True):
        assert a.dtype == leaf.dtype
        assert relative(a, b) < BOUND[dtype]
    assert (grads[1][vocab_size:] == 0).all()


def test_entry_t_is_about_token_t_and_reads_the_hidden_state_before_it() -> None:
    case = make()
    base = token_logprobs(case.hidden, case.weight, case.token_ids)
    with torch.no_grad():
        case.hidden[1, 4] += 1.0
    moved = token_logprobs(case.hidden, case.weight, case.token_ids) != base
    assert moved.nonzero().tolist() == [[1, 5]]


@pytest.mark.slow
def test_tiles_and_many_blocks_change_nothing_but_the_last_bits() -> None:
    case = make(2, 30, 32, 5000, dtype=torch.bfloat16, scale=0.3)
    want = formula(case.double())[0]
    for chunk in (None, 7, 29):
        got = token_logprobs(case.hidden, case.weight, case.token_ids, chunk=chunk)
        assert (got - want).abs().max() < 1e-5


@pytest.mark.parametrize("offset", [-500.0, -90.0, 90.0, 500.0])
def test_logits_beyond_the_range_of_exp_lose_nothing(offset: float) -> None:
    case = make(2, 8, 16, 4500, bias=True)
    with torch.no_grad():
        case.bias[::2] += offset
        case.bias[1::2] += offset - 3.0
    double = case.double()
    got = token_logprobs(case.hidden, case.weight, case.token_ids, bias=case.bias, entropy=True)
    want = formula(double)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-4)
    grads = torch.autograd.grad([x.sum() for x in got], case.leaves())
    exact = torch.autograd.grad([x.sum() for x in want], double.leaves())
    for a, b in zip(grads, exact, strict=True):
        assert relative(a, b) < 1e-3


def test_fast_is_closer_to_float64_than_a_whole_row_softmax_and_a_bf16_head_is_far() -> None:
    case = make(1, 65, 256, 30_000, dtype=torch.bfloat16, scale=0.3)
    want = formula(case.double())[0].detach()
    error = {
        mode: (token_logprobs(case.hidden, case.weight, case.token_ids, mode=mode) - want).abs().mean().item()
        for mode in ("fast", "exact_mirror")
    }
    rounded = torch.nn.functional.linear(case.hidden, case.weight).float().log_softmax(-1)
    bf16_head = rounded[:, :-1].gather(-1, case.token_ids[:, 1:, None])[..., 0]
    assert error["fast"] < error["exact_mirror"] < 1e-4
    assert (bf16_head - want[:, 1:]).abs().mean() > 100 * error["exact_mirror"]


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("soft_cap", "logit_scale"), [(None, 1.0), (20.0, 0.5)])
def test_exact_mirror_has_the_bits_of_the_engines_decode_step(
    batch: int, temperature: float, soft_cap: float | None, logit_scale: float
) -> None:
    case = make(1, 129, 256, 3000, dtype=torch.bfloat16, scale=0.3)
    mirrored = token_logprobs(
        case.hidden, case.weight, case.token_ids, mode="exact_mirror", chunk=50, temperature=temperature,
        soft_cap=soft_cap, logit_scale=logit_scale,
    )[0, 1:]  # fmt: skip
    steps = []
    for hidden, token in zip(case.hidden[0, :-1].split(batch), case.token_ids[0, 1:].split(batch), strict=True):
        logits = projection.project(hidden, case.weight)  # what the engine's head returns, then what its sampler does
        if soft_cap is not None:
            logits = torch.tanh(logits / soft_cap) * soft_cap
        logits = logits * logit_scale
        logits = logits.div_(torch.full((len(hidden),), temperature).unsqueeze(1))
        steps.append(logits.log_softmax(dim=-1, dtype=torch.float32).gather(-1, token[:, None])[:, 0])
    assert torch.equal(mirrored, torch.cat(steps))


def test_entropy_and_mode_leave_the_logprobs_alone() -> None:
    case = make(dtype=torch.bfloat16)
    for mode in ("fast", "exact_mirror"):
        alone = token_logprobs(case.hidden, case.weight, case.token_ids, mode=mode)
        together, _ = token_logprobs(case.hidden, case.weight, case.token_ids, mode=mode, entropy=True)
        assert torch.equal(alone, together)


@pytest.mark.parametrize("mode", ["fast", "exact_mirror"])
@pytest.mark.parametrize("options", [{}, {"soft_cap": 5.0, "temperature": 0.7, "logit_scale": 2.0}])
@pytest.mark.parametrize("size", [1, 20])
def test_kept_sets_renormalise(mode: str, options: dict[str, float], size: int) -> None:
    case = make(v=4200, bias=True)
    kept = draw_kept(case, size)
    double = case.double()
    got = token_logprobs(
        case.hidden, case.weight, case.token_ids, bias=case.bias, kept=kept, mode=mode, chunk=7, entropy=True, **options
    )
    want = formula(double, kept=kept, **options)
    upstream = [torch.randn(3, 12, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
    grads = torch.autograd.grad(got, case.leaves(), upstream)
    exact = torch.autograd.grad(want, double.leaves(), [u.double() for u in upstream])
    for a, b in zip(grads, exact, strict=True):
        assert a.isfinite().all() and (a.double() - b).norm() <= 2e-5 * b.norm() + 1e-4


def test_kept_sets_have_the_bits_of_the_engines_masked_softmax() -> None:
    case = make(2, 10, 64, 3000, dtype=torch.bfloat16)
    kept = draw_kept(case, 30)
    got = token_logprobs(case.hidden, case.weight, case.token_ids, kept=kept, mode="exact_mirror")
    logits = projection.project(case.hidden, case.weight)
    masked = logits.masked_fill(~allowed(kept, logits), -float("inf")).log_softmax(-1, dtype=torch.float32)
    assert torch.equal(got[:, 1:], masked[:, :-1].gather(-1, case.token_ids[:, 1:, None])[..., 0])


def test_kept_everything_is_no_truncation() -> None:
    case = make()
    everything = torch.arange(90).expand(3, 12, 90)
    plain = token_logprobs(case.hidden, case.weight, case.token_ids)
    assert torch.equal(token_logprobs(case.hidden, case.weight, case.token_ids, kept=everything), plain)
