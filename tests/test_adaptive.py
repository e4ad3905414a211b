"""Adaptive temperature: sums and gradients against float64, losses by hand, laws of ranking, masking and convention."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.calibration.adaptive import AdaptiveTemperature, ClassBatch, Objective, Projection, TokenBatch, Training
from rlalign.calibration.adaptive.batches import token_batches
from rlalign.calibration.adaptive.fitting import scale_of
from rlalign.calibration.adaptive.sums import LOSSES
from rlalign.logprobs import token_logprobs

D, V = 16, 50
EVERY_OBJECTIVE = [Objective(loss=loss) for loss in LOSSES] + [
    Objective(loss="selective", alpha=0.3, alpha_form=form) for form in ("share", "balanced", "added")
]
NAMES = [f"{o.loss}-{o.alpha_form}-{o.alpha}" for o in EVERY_OBJECTIVE]


def projection(seed: int = 0, size: float = 1.0, **options) -> Projection:
    weight_VD = torch.randn(V, D, generator=torch.Generator().manual_seed(seed)) * size
    return Projection(weight_VD=weight_VD, **options)


def batch(
    seed: int = 0, *, b: int = 4, length: int = 9, head: Projection | None = None, slope: float = 1.0
) -> TokenBatch:
    """Tokens drawn from the model at a temperature that depends on the first hidden number: T = exp(1 + slope h0)."""
    g = torch.Generator().manual_seed(seed)
    head = head or projection()
    hidden = torch.randn(b, length, D, generator=g)
    logits_BLV = hidden[:, :-1] @ head.weight_VD.T / torch.exp(1 + slope * hidden[:, :-1, :1])
    ids = torch.zeros(b, length, dtype=torch.int64)
    ids[:, 1:] = torch.multinomial(logits_BLV.softmax(-1).flatten(0, 1), 1, generator=g).view(b, length - 1)
    mask = torch.rand(b, length, generator=g) < 0.7
    mask[:, 0], mask[:, 1] = False, True
    return TokenBatch(hidden=hidden, token_ids=ids, mask=mask, projection=head)


def logits64(tokens: TokenBatch) -> torch.Tensor:
    """[N, V] float64 of the scored tokens: what the code under test never forms."""
    p = tokens.projection
    z = tokens.states().double() @ p.weight_VD[: p.rows].double().T
    if p.bias_V is not None:
        z = z + p.bias_V[: p.rows].double()
    if p.soft_cap is not None:
        z = torch.tanh(z / p.soft_cap) * p.soft_cap
    return z * p.logit_scale


def reference_losses(objective: Objective, z_NV, target_N, scale_N) -> torch.Tensor:
    """Losses straight from their definitions, on a whole table of logits."""
    logp_NV = (z_NV * scale_N[:, None]).log_softmax(-1)
    hard_N, uniform_N = -logp_NV.gather(1, target_N[:, None])[:, 0], -logp_NV.mean(1)
    right_N = z_NV.argmax(1) == target_N
    p_N = logp_NV.max(1).values.exp()
    if objective.loss == "top_label":
        return torch.nn.functional.binary_cross_entropy(p_N, right_N.double(), reduction="none")
    if objective.loss == "selective":
        a, alpha = right_N.double().mean(), objective.alpha
        if objective.alpha_form == "added":
            return hard_N + alpha * uniform_N * ~right_N
        if objective.alpha_form == "share":
            return torch.where(right_N, (1 - alpha) * hard_N, alpha * uniform_N)
        hard, smooth = (1 - alpha) * (1 - a), alpha * a
        each_N = torch.where(right_N, hard * hard_N / right_N.sum(), smooth * uniform_N / (~right_N).sum())
        return each_N * len(each_N) / (hard + smooth)
    share = {"cross_entropy": 0.0, "uniform": 1.0, "label_smoothing": objective.smoothing}[objective.loss]
    return (1 - share) * hard_N + share * uniform_N


@pytest.mark.parametrize("objective", EVERY_OBJECTIVE, ids=NAMES)
@pytest.mark.parametrize("size", [0.3, 1.0, 8.0], ids=["flat", "plain", "sharp"])
def test_loss_and_gradient_are_those_of_autograd_in_float64(objective, size):
    tokens = batch(1, head=projection(size=size, chunk=7))
    z_NV, target_N = logits64(tokens), tokens.token_ids[tokens.mask]
    scale_N = torch.linspace(0.05, 4.0, len(tokens))
    accuracy = float((z_NV.argmax(1) == target_N).double().mean())
    reference_scale_N = scale_N.double().requires_grad_()
    wanted_N = reference_losses(objective, z_NV, target_N, reference_scale_N)
    (wanted_grad_N,) = torch.autograd.grad(wanted_N.sum(), reference_scale_N)
    scale_N.requires_grad_()
    facts = tokens.facts()
    got_N = objective.per_token(tokens.rest(scale_N, facts), scale_N, facts, accuracy)
    (got_grad_N,) = torch.autograd.grad(got_N.sum(), scale_N)
    if objective.loss == "top_label":  # float64 itself loses 1 - p of nearly certain tokens
        kept_N = (wanted_N < 25).nonzero()[:, 0]
        assert len(kept_N) > len(wanted_N) / 4
        got_N, wanted_N, got_grad_N, wanted_grad_N = (
            each[kept_N] for each in (got_N, wanted_N, got_grad_N, wanted_grad_N)
        )
    torch.testing.assert_close(got_N.double(), wanted_N, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(got_grad_N.double(), wanted_grad_N, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("options", [{}, {"soft_cap": 5.0}, {"logit_scale": 0.3}, {"vocab_size": 41, "chunk": 5}])
def test_facts_are_those_of_the_whole_table(options):
    bias_V = torch.randn(V, generator=torch.Generator().manual_seed(5))
    tokens = batch(2)
    ids = tokens.token_ids % 41
    tokens = TokenBatch(
        hidden=tokens.hidden, token_ids=ids, mask=tokens.mask, projection=projection(bias_V=bias_V, **options)
    )
    z_NV, facts = logits64(tokens), tokens.facts()
    two_N2 = z_NV.topk(2, dim=1).values
    for got, wanted in (
        (facts.target_N, z_NV.gather(1, ids[tokens.mask][:, None])[:, 0]),
        (facts.top_N, two_N2[:, 0]),
        (facts.runner_up_N, two_N2[:, 1]),
        (facts.mean_N, z_NV.mean(1)),
    ):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(facts.top_id_N, z_NV.argmax(1))
    assert torch.equal(facts.right_N, z_NV.argmax(1) == ids[tokens.mask])


def test_many_tiles_and_one_give_the_same(monkeypatch):
    from rlalign.calibration.adaptive import sums

    tokens = batch(3)
    scale_N = torch.rand(len(tokens), generator=torch.Generator().manual_seed(0)) + 0.2
    facts = tokens.facts()
    whole_N = tokens.rest(scale_N, facts)
    monkeypatch.setattr(sums.Tile, "of", staticmethod(lambda device, chunk: sums.Tile(3, 11)))
    tiled = tokens.facts()
    for a, b in zip(facts, tiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tokens.rest(scale_N, tiled), whole_N, rtol=1e-6, atol=1e-6)


def test_the_first_of_equal_logits_is_the_top_one_in_any_tiling(monkeypatch):
    from rlalign.calibration.adaptive import sums

    weight_VD = torch.zeros(V, D)
    weight_VD[[7, 30, 44], 0] = 1.0
    ids = torch.tensor([[0, 7, 30]])
    tokens = TokenBatch(
        hidden=torch.ones(1, 3, D), token_ids=ids, mask=ids > 0, projection=Projection(weight_VD=weight_VD)
    )
    for tile in (sums.Tile(8, 64), sums.Tile(1, 10)):
        monkeypatch.setattr(sums.Tile, "of", staticmethod(lambda device, chunk, tile=tile: tile))
        facts = tokens.facts()
        assert facts.top_id_N.tolist() == [7, 7] and facts.right_N.tolist() == [True, False]
        assert facts.runner_up_N.tolist() == [1.0, 1.0]


def test_certain_tokens_keep_a_gradient():
    """Logits 400 apart: float32 probabilities are exactly 0 and 1, losses and gradients are not."""
    logits = torch.tensor([[400.0, 0.0, -5.0], [400.0, 0.0, -5.0]])
    rows = ClassBatch(hidden=torch.zeros(2, 1), logits=logits, labels=torch.tensor([0, 1]))
    facts, scale_N = rows.facts(), torch.ones(2, requires_grad=True)
    loss_N = Objective(loss="top_label").per_token(rows.rest(scale_N, facts), scale_N, facts, 0.5)
    (grad_N,) = torch.autograd.grad(loss_N.sum(), scale_N)
    loss_N = loss_N.detach()
    assert loss_N[0] == 0.0 and loss_N[1] == pytest.approx(400 - math.log1p(math.exp(-5)), rel=1e-6)
    assert grad_N[1] == pytest.approx(400.0, rel=1e-3)


# ranking, alignment, conventions


@settings(max_examples=100, deadline=None)
@given(
    z=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=8),
    raw=st.floats(-50, 50, width=32),
    output=st.sampled_from(["log_inverse_temperature", "log_temperature"]),
)
def test_law_the_order_of_logits_never_turns(z, raw, output):
    """x / T is monotone in floating point too: smaller stays no larger. Neighbours an ulp apart may meet, no more."""
    scale = scale_of(torch.tensor([raw]), (0.1, 100.0), output)
    assert 1 / 100.001 < float(scale) < 10.001
    z_V = torch.tensor(z).sort().values
    assert bool(((z_V * scale).diff() >= 0).all()) and bool(((z_V / (1 / scale)).diff() >= 0).all())


@pytest.fixture(scope="module")
def fitted() -> AdaptiveTemperature:
    return AdaptiveTemperature(head="linear", training=Training(epochs=8, least_steps=1)).fit(
        [batch(i) for i in range(20)]
    )


def test_accuracy_and_argmax_are_the_uncalibrated_models(fitted):
    tokens = batch(99)
    z_NV = logits64(tokens)
    scaled_NV = z_NV / fitted.temperature_of(tokens)[:, None].double()
    assert torch.equal(scaled_NV.argsort(1), z_NV.argsort(1))
    assert torch.equal(fitted.confidence(tokens).right_N, z_NV.argmax(1) == tokens.token_ids[tokens.mask])


def test_confidence_is_the_softmax_of_scaled_logits(fitted):
    tokens = batch(98)
    p_NV = (logits64(tokens) / fitted.temperature_of(tokens)[:, None].double()).softmax(-1)
    got = fitted.confidence(tokens)
    torch.testing.assert_close(got.top_N.double(), p_NV.max(1).values, rtol=1e-5, atol=1e-7)
    wanted_N = p_NV.gather(1, tokens.token_ids[tokens.mask][:, None])[:, 0]
    torch.testing.assert_close(got.target_N.double(), wanted_N, rtol=1e-5, atol=1e-7)


def test_temperatures_are_aligned_to_token_ids(fitted):
    """What token_logprobs takes: entry t scales the logits that predict token t."""
    tokens = batch(97)
    temperature_BL = fitted.temperatures(tokens.hidden)
    assert bool((temperature_BL[:, 0] == 1.0).all())
    torch.testing.assert_close(temperature_BL[tokens.mask], fitted.temperature_of(tokens))
    logprobs_BL = token_logprobs(
        tokens.hidden, tokens.projection.weight_VD, tokens.token_ids, temperature=temperature_BL, mask=tokens.mask
    )
    torch.testing.assert_close(logprobs_BL[tokens.mask].exp(), fitted.confidence(tokens).target_N)


def test_multiplying_and_dividing_learn_the_same_temperatures():
    data, seen = [batch(i) for i in range(12)], batch(96)
    multiply, divide = (
        AdaptiveTemperature(head="linear", output=output, training=Training(epochs=4, least_steps=1))
        .fit(data)
        .temperature_of(seen)
        for output in ("log_inverse_temperature", "log_temperature")
    )
    torch.testing.assert_close(multiply, divide, rtol=1e-4, atol=1e-5)
    assert (multiply - 1).abs().max() > 0.2


def test_a_token_outside_the_range_can_come_back():
    """A plain clamp has no gradient there; this one has it inwards, and none outwards."""
    raw = torch.tensor([5.0, 5.0, -9.0, -9.0, 0.0], requires_grad=True)
    scale = scale_of(raw, (0.1, 100.0), "log_inverse_temperature")
    scale.backward(torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]))
    assert [bool(g != 0) for g in raw.grad] == [True, False, False, True, True]
    torch.testing.assert_close(1 / scale.detach(), torch.tensor([0.1, 0.1, 100.0, 100.0, 1.0]))


def test_batches_from_separate_sequences_are_the_padded_batch():
    tokens = batch(5, b=3, length=6)
    lengths, starts = [6, 4, 5], [2, 1, 3]
    made = token_batches(
        [h[:n] for h, n in zip(tokens.hidden, lengths, strict=True)],
        [ids[:n].tolist() for ids, n in zip(tokens.token_ids, lengths, strict=True)],
        starts,
        tokens.projection,
        batch_size=2,
    )
    assert [len(each) for each in made] == [4 + 3, 2]
    wanted = [tokens.hidden[i, s - 1 : n - 1] for i, (s, n) in enumerate(zip(starts, lengths, strict=True))]
    assert torch.equal(torch.cat([each.states() for each in made]), torch.cat(wanted))
