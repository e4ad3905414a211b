"""token_logprobs where trainers put it: masks, packing, checkpointing, autocast, compile, ZeRO-3; and bad input."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rlalign.logprobs import token_logprobs

D, V = 32, 300


def make(batch: int = 3, length: int = 10, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, length, D, generator=g).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(V, D, generator=g)).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (batch, length), generator=g)


def grads(logprobs: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weights = torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs)
    return torch.autograd.grad((weights * logprobs).sum(), leaves)


def test_masked_equals_sliced_and_costs_nothing_elsewhere() -> None:
    hidden, weight, ids = make()
    mask = torch.zeros(3, 10, dtype=torch.bool)
    mask[0, 3:7] = mask[2, 9] = True  # sequence 1 is all padding
    whole, entropy = token_logprobs(hidden, weight, ids, entropy=True)
    got, got_entropy = token_logprobs(hidden, weight, ids, mask=mask, entropy=True)
    assert torch.equal(got, whole * mask) and torch.equal(got_entropy, entropy * mask)
    want = grads(whole * mask, hidden, weight)
    for a, b in zip(grads(got, hidden, weight), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    broken = hidden.detach().clone()
    broken[1] = float("nan")  # what attention makes of a sequence that is all padding
    ids[1] = -100
    assert torch.equal(token_logprobs(broken, weight, ids, mask=mask), got)


def test_packed_sequences_equal_the_same_sequences_apart() -> None:
    hidden, weight, ids = make(1, 20)
    bounds = [0, 6, 7, 15]
    packed = token_logprobs(hidden, weight, ids, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for start, stop in pairwise(bounds):
        assert torch.equal(packed[:, start:stop], token_logprobs(hidden[:, start:stop], weight, ids[:, start:stop]))
    assert (packed[:, 15:] == 0).all()
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[0, 8:12] = True
    both = token_logprobs(hidden, weight, ids, cu_seqlens=torch.tensor(bounds), mask=mask)
    assert torch.equal(both, packed * mask)


def test_each_token_takes_its_own_upstream_gradient() -> None:
    hidden, weight, ids = make(dtype=torch.float32)
    got = token_logprobs(hidden, weight, ids)
    one = torch.autograd.grad(got[1, 4], hidden, retain_graph=True)[0]
    assert one[1, 3].abs().sum() > 0 and one.count_nonzero() == one[1, 3].count_nonzero()
    total = grads(got, hidden)[0]
    torch.testing.assert_close(total[1, 3], one[1, 3] * torch.linspace(-1, 2, 30).view(3, 10)[1, 4])


def test_checkpointing_recomputes_the_same_gradients() -> None:
    hidden, weight, ids = make()
    plain = token_logprobs(hidden, weight, ids)
    again = checkpoint(token_logprobs, hidden, weight, ids, use_reentrant=False)
    assert torch.equal(plain, again)
    for a, b in zip(grads(plain, hidden, weight), grads(again, hidden, weight), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_round_the_logits(dtype: torch.dtype) -> None:
    hidden, weight, ids = make(dtype=dtype)
    plain = token_logprobs(hidden, weight, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = token_logprobs(hidden, weight, ids)
        under_grads = grads(under, hidden, weight)
    assert torch.equal(plain, under)
    for a, b in zip(grads(plain, hidden, weight), under_grads, strict=True):
        assert torch.equal(a, b)


def test_compiled_caller_has_no_graph_break_and_the_same_gradients(compiling) -> None:
    hidden, weight, ids = make()

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        logprobs, entropy = token_logprobs(h * 2, w, ids, entropy=True, temperature=0.7)
        return (logprobs.exp() + 0.1 * entropy).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(hidden, weight), (hidden, weight)),
        torch.autograd.grad(loss(hidden, weight), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_weight_released_after_the_forward_is_read_again_in_the_backward() -> None:
    hidden, weight, ids = make()
    want = grads(token_logprobs(hidden, weight, ids), hidden, weight)
    logprobs = token_logprobs(hidden, weight, ids)
    full, weight.data = weight.data, torch.empty(0, dtype=weight.dtype)  # as ZeRO-3 partitions it ...
    with pytest.raises(ValueError, match="ZeRO-3"):
        token_logprobs(hidden, weight, ids)
    weight.data = full  # ... and gathers it before the backward
    for a, b in zip(grads(logprobs, hidden, weight), want, strict=True):
        assert torch.equal(a, b)


def test_frozen_head_and_frozen_body() -> None:
    hidden, weight, ids = make()
    both = grads(token_logprobs(hidden, weight, ids), hidden, weight)
    assert torch.equal(grads(token_logprobs(hidden, weight.detach(), ids), hidden)[0], both[0])
    assert torch.equal(grads(token_logprobs(hidden.detach(), weight, ids), weight)[0], both[1])


def test_one_token_has_no_context() -> None:
    hidden, weight, ids = make(2, 1)
    logprobs = token_logprobs(hidden, weight, ids)
    assert logprobs.tolist() == [[0.0], [0.0]]
    for grad in torch.autograd.grad(logprobs.sum(), (hidden, weight)):
        assert (grad == 0).all()


BAD = {
    "expected hidden": lambda h, w, i: (h[0], w, i, {}),
    "expected hidden .* and token_ids": lambda h, w, i: (h, w, i[:, :5], {}),
    "hidden must be float32": lambda h, w, i: (h.double(), w, i, {}),
    "token_ids must be int64": lambda h, w, i: (h, w, i.int(), {}),
    "empty batch": lambda h, w, i: (h[:0], w, i[:0], {}),
    "meta device": lambda h, w, i: (h, w.to("meta"), i, {}),
    "call this inside the forward": lambda h, w, i: (h, w.new_empty(0), i, {}),
    "expected a bias": lambda h, w, i: (h, w, i, {"bias": w[:7, 0]}),
    "temperature must be positive": lambda h, w, i: (h, w, i, {"temperature": 0.0}),
    "temperature must be positive, got nan": lambda h, w, i: (h, w, i, {"temperature": float("nan")}),
    "every temperature must be positive": lambda h, w, i: (h, w, i, {"temperature": torch.tensor([1.0, 0.5, 0.0])}),
    "temperature must be a number": lambda h, w, i: (h, w, i, {"temperature": torch.ones(7)}),
    "soft_cap must be positive": lambda h, w, i: (h, w, i, {"soft_cap": 0.0}),
    "chunk must be positive": lambda h, w, i: (h, w, i, {"chunk": 0}),
    "logit_scale must be finite": lambda h, w, i: (h, w, i, {"logit_scale": float("inf")}),
    "vocab_size must be in": lambda h, w, i: (h, w, i, {"vocab_size": V + 1}),
    "mode must be": lambda h, w, i: (h, w, i, {"mode": "mirror"}),
    "mask must be bool": lambda h, w, i: (h, w, i, {"mask": torch.ones(3, 10)}),
    "mask holds token 0": lambda h, w, i: (h, w, i, {"mask": torch.ones(3, 10, dtype=torch.bool)}),
    "keeps no token": lambda h, w, i: (h, w, i, {"mask": torch.zeros(3, 10, dtype=torch.bool)}),
    "kept must be int64": lambda h, w, i: (h, w, i, {"kept": i}),
    "not in its own kept set": lambda h, w, i: (h, w, i, {"kept": (i[..., None] + 1) % V}),
    "batch of one": lambda h, w, i: (h, w, i, {"cu_seqlens": torch.tensor([0, 5, 10])}),
    r"token_ids\[0, 1\] = 300 is outside": lambda h, w, i: (h, w, i.fill_(V), {}),
    r"token_ids\[0, 1\] = -100 is outside": lambda h, w, i: (h, w, i.fill_(-100), {}),
    "outside the vocabulary of 290": lambda h, w, i: (h, w, i.fill_(295), {"vocab_size": 290}),
    r"hidden\[0, 0\] is not finite": lambda h, w, i: (h * float("nan"), w, i, {}),
    "the bias is not finite": lambda h, w, i: (h, w, i, {"bias": torch.full((V,), -float("inf"))}),
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_input_is_named_before_any_product(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_product(*_: object, **__: object) -> None:
        raise AssertionError("a product ran on bad input")

    monkeypatch.setattr("rlalign.head.products.matmul", no_product)
    hidden, weight, ids, options = BAD[message](*make())
    with pytest.raises(ValueError, match=message):
        token_logprobs(hidden, weight, ids, **options)


def test_compiled_out_of_vocabulary_ids_give_nan_not_a_number(compiling) -> None:
    hidden, weight, ids = make()
    ids[1, 3] = V + 5
    for mode in ("fast", "exact_mirror"):
        compiled = torch.compile(lambda h, w, m=mode: token_logprobs(h, w, ids, mode=m), backend="aot_eager")
        assert compiled(hidden.detach(), weight.detach()).isnan().nonzero().tolist() == [[1, 3]]
