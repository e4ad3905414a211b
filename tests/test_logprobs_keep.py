"""keep_mib: logits kept from the forward to the backward pass change the time and the memory, never a number."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rlalign.logprobs import token_logprobs
from rlalign.logprobs.blocks import Stash, columns_of, stash_size
from rlalign.logprobs.forward import Problem
from rlalign.trainer.head_mirror import Tokens, mirror
from tests import attribution_parts as parts

D, V = 24, 5000  # three vocabulary blocks
TOKENS = 2 * 299
WHOLE = 12  # MiB that hold all logits

OPTIONS = {
    "plain": {},
    "transformed": {"soft_cap": 5.0, "logit_scale": 0.5, "temperature": 0.7, "vocab_size": 4100},
    "tiles": {"chunk": 20},
    "kept": {"kept": True},
    "masked": {"mask": True},
    "packed": {"cu": True},
    "huge": {"scale": 60.0},  # sums that leave float32: those rows are summed again with a running maximum
}


def case(dtype: torch.dtype, scale: float = 0.3, length: int = 300) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, length, D, generator=g).to(dtype).requires_grad_()
    weight = (scale * torch.randn(V, D, generator=g)).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=g).requires_grad_()
    return hidden, weight, bias, torch.randint(0, 4000, (2, length), generator=g)


def scored(dtype: torch.dtype, name: str, **more: object) -> list[torch.Tensor]:
    """Logprobs, entropies if asked for, and the gradients of an uneven loss for hidden states, weight and bias."""
    options = OPTIONS[name] | more
    length = options.pop("length", 300)
    hidden, weight, bias, ids = case(dtype, options.pop("scale", 0.3), length)
    if options.pop("kept", False):
        options["kept"] = torch.stack((ids, (ids + 7) % 4000, torch.full_like(ids, -1)), -1)
    if options.pop("mask", False):
        options["mask"] = (ids % 3 == 0) & (torch.arange(length) > 0)
    if options.pop("cu", False):
        hidden, ids = hidden.reshape(1, 2 * length, D), ids.reshape(1, 2 * length)
        options["cu_seqlens"] = torch.tensor([0, length - 20, 2 * length - 5])
    result = token_logprobs(hidden, weight, ids, bias=bias, **options)
    results = result if isinstance(result, tuple) else (result,)
    ramp = torch.linspace(-1, 2, ids.numel()).view_as(ids)
    loss = sum((ramp.roll(i) * x).sum() for i, x in enumerate(results))
    return [x.detach() for x in results] + list(torch.autograd.grad(loss, (hidden, weight, bias)))


@pytest.mark.parametrize("mode", ["fast", "exact_mirror"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.nightly)], ids=str
)
def test_gradients_have_the_same_bits_whatever_is_kept(dtype, name, mode):
    for entropy in (False, True):
        wanted = scored(dtype, name, mode=mode, entropy=entropy, length=60)
        for keep_mib in (1, 2, 200):  # of 2.25 MiB: a part, all but a part, and more than there is
            got = scored(dtype, name, mode=mode, entropy=entropy, length=60, keep_mib=keep_mib)
            # a product of other columns at once may round differently where its bits depend on the batch
            exact = mode == "fast" or dtype == torch.bfloat16
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-4)


@pytest.fixture
def products(monkeypatch):
    """How many tiles of logits were multiplied."""
    count = []
    inner = Problem.logits
    monkeypatch.setattr(Problem, "logits", lambda self, *a: count.append(1) or inner(self, *a))
    return count


@pytest.mark.parametrize(("keep_mib", "again"), [(0, 3), (1, 3), (4, 2), (8, 1), (WHOLE, 0)])
def test_what_is_kept_is_not_multiplied_again(products, keep_mib, again):
    scored(torch.float32, "plain", keep_mib=keep_mib)
    assert len(products) == 3 + again


def test_without_a_gradient_nothing_is_kept(monkeypatch):
    sizes = []
    monkeypatch.setattr("rlalign.logprobs.op.stash_size", lambda *a: sizes.append(stash_size(*a)) or sizes[-1])
    hidden, weight, _, ids = case(torch.float32)
    with torch.no_grad():
        token_logprobs(hidden, weight, ids, keep_mib=WHOLE)
    token_logprobs(hidden.detach(), weight.detach(), ids, keep_mib=WHOLE)
    token_logprobs(hidden, weight.detach(), ids, keep_mib=WHOLE)
    assert sizes[:2] == [0, 0] and sizes[2] > TOKENS * V


@pytest.mark.parametrize("keep_mib", [0, 1, 2, 3, 7, WHOLE, 10**6])
def test_the_budget_is_never_exceeded_and_whole_tiles_fill_it(keep_mib):
    size = stash_size(TOKENS, V, 2048, keep_mib)
    assert 4 * size <= keep_mib * 2**20 and size < 1.1 * TOKENS * V
    flat, room = torch.zeros(size), 0
    stash = Stash(flat, TOKENS, V, 2048)
    for columns in columns_of(V, 2048):
        for start in range(0, TOKENS, 100):
            tile = stash.tile(slice(start, min(start + 100, TOKENS)), columns)
            if tile is not None:
                tile += 1  # no tile lies on another
                room += tile.numel()
    assert (flat <= 1).all() and flat.sum() == room
    assert room == TOKENS * V if keep_mib >= WHOLE else 4 * room > 0.8 * keep_mib * 2**20 - 4 * 100 * 2048


def test_the_stash_is_the_only_thing_that_lasts_and_goes_with_the_graph(monkeypatch):
    made = []
    inner = torch.empty

    def empty(*size, **options):
        made.append(inner(*size, **options))
        return made[-1]

    monkeypatch.setattr("rlalign.logprobs.op.torch.empty", empty)
    hidden, weight, _, ids = case(torch.float32)
    logprobs = token_logprobs(hidden, weight, ids, keep_mib=4)
    monkeypatch.undo()
    stashes = [x for x in made if x.dim() == 1 and 4 * x.numel() == 4 * 2**20]
    assert len(stashes) == 1
    storage = weakref.ref(stashes[0].untyped_storage())
    made.clear(), stashes.clear()
    logprobs.sum().backward()
    del logprobs
    gc.collect()
    assert storage() is None


def test_a_second_backward_pass_reads_the_same_logits():
    hidden, weight, _, ids = case(torch.float32)
    loss = token_logprobs(hidden, weight, ids, keep_mib=WHOLE).square().sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), first, strict=True):
        assert torch.equal(a, b)


def test_the_entropy_alone_and_the_logprob_alone_have_gradients():
    hidden, weight, _, ids = case(torch.float32)
    for which in (0, 1):
        results = token_logprobs(hidden, weight, ids, keep_mib=WHOLE, entropy=True)
        got = torch.autograd.grad(results[which].sum(), hidden)[0]
        logprobs = torch.nn.functional.linear(hidden[:, :-1].double(), weight.double()).log_softmax(-1)
        exact = (logprobs.gather(-1, ids[:, 1:, None]).sum(), -(logprobs.exp() * logprobs).sum())[which]
        wanted = torch.autograd.grad(exact, hidden)[0]
        assert float((got - wanted).norm()) < 1e-4 * float(wanted.norm())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_what_was_kept(reentrant):
    hidden, weight, _, ids = case(torch.bfloat16)
    wanted = torch.autograd.grad(token_logprobs(hidden, weight, ids).sum(), (hidden, weight))
    again = checkpoint(
        lambda h, w: token_logprobs(h, w, ids, keep_mib=5), hidden, weight, use_reentrant=reentrant
    )  # fmt: skip
    again.sum().backward()
    assert torch.equal(hidden.grad, wanted[0]) and torch.equal(weight.grad, wanted[1])


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_compiled_caller_keeps_too(compiling, products, dynamic):
    hidden, weight, _, ids = case(torch.bfloat16)

    def loss(h, w, t):
        logprobs, entropy = token_logprobs(h * 2, w, t, entropy=True, keep_mib=WHOLE)
        return (logprobs.exp() + 0.1 * entropy).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    got = torch.autograd.grad(compiled(hidden, weight, ids), (hidden, weight))
    assert len(products) == 3
    for a, b in zip(got, torch.autograd.grad(loss(hidden, weight, ids), (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_operators_obey_torchs_own_rules():
    hidden, weight, _, ids = case(torch.float32)
    operands = (
        hidden[0, :9].detach().requires_grad_(),
        weight.detach().requires_grad_(),
        None,
        ids[0, 1:10],
        None,
    )
    everything, pairs = (None, None), torch.stack([ids[0, 1:10], (ids[0, 1:10] + 1) % V], 1)
    sets = (pairs.flatten().int(), torch.arange(0, 19, 2))
    options = (None, 1.0, V, None, True, False)
    for kept in (everything, sets):
        torch.library.opcheck(torch.ops.rlalign.token_logprobs, (*operands, *kept, *options, 0))
    # what a stash has no use for is uninitialised, so its values cannot be compared
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.rlalign.token_logprobs, (*operands, *everything, *options, 1), test_utils=utils)


def test_a_runs_budget_reaches_the_trainers_head(products):
    network = parts.model().bfloat16()
    mirror(network, head_dtype="float32", chunk=0, keep_mib=WHOLE)
    batch = parts.batch(2)
    hidden_BLD = network.base_model(batch.token_ids_BL, attention_mask=batch.attention_mask_BL).last_hidden_state
    logprobs, _ = network.lm_head(hidden_BLD, Tokens(batch.token_ids_BL, batch.loss_mask_BL, 1.0))
    logprobs.sum().backward()
    assert len(products) == 1 and float(network.lm_head.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("keep_mib", [-1, 0.5])
def test_a_budget_that_is_none_is_refused(keep_mib):
    hidden, weight, _, ids = case(torch.float32)
    with pytest.raises(ValueError, match="keep_mib must be a whole number"):
        token_logprobs(hidden, weight, ids, keep_mib=keep_mib)
