"""Selective smoothing: the three readings of alpha, and the defects of the official code that are not inherited."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.calibration.adaptive import Objective, Projection, TokenBatch
from tests.test_adaptive import EVERY_OBJECTIVE, NAMES


def official_like(objective: Objective, tokens: TokenBatch) -> torch.Tensor:
    facts, one_N = tokens.facts(), torch.ones(len(tokens))
    accuracy = float(facts.right_N.float().mean())
    return objective.per_token(tokens.rest(one_N, facts), one_N, facts, accuracy).mean()


def four_tokens(extra: int = 0, labels=(0, 1, 2, 1)) -> TokenBatch:
    """The four tokens of the reference calculation, hidden states being the logits; `extra` masked ones after them."""
    z = torch.tensor([[2.0, 0, -1], [1, 0.5, 0], [0, 1, 2], [0.5, 0.4, -1]])
    hidden = torch.cat((z, torch.zeros(1 + extra, 3)))[None]
    ids = torch.tensor([[0, *labels, *[1] * extra]])
    mask = torch.tensor([[False, *[True] * 4, *[False] * extra]])
    return TokenBatch(hidden=hidden, token_ids=ids, mask=mask, projection=Projection(weight_VD=torch.eye(3)))


def test_the_three_forms_of_alpha_on_four_tokens():
    """Values of the official code (balanced) and of the other two readings, computed independently."""
    wanted = {"balanced": 0.761556, "share": 0.380778, "added": 0.961818}
    for form, value in wanted.items():
        assert float(official_like(Objective(loss="selective", alpha_form=form), four_tokens())) == pytest.approx(
            value, abs=1e-6
        )


@pytest.mark.parametrize("objective", EVERY_OBJECTIVE, ids=NAMES)
def test_masked_tokens_change_nothing(objective):
    """Officially they count as wrong, add zeros to the mean and lower the accuracy: 0.761556 became 0.319410."""
    assert float(official_like(objective, four_tokens(extra=4))) == float(official_like(objective, four_tokens()))


@pytest.mark.parametrize("labels", [(0, 0, 2, 0), (1, 1, 0, 1)], ids=["all right", "all wrong"])
def test_a_batch_of_one_kind_has_a_gradient(labels):
    """Officially its loss is exactly 0. Balanced takes the accuracy of the whole fitted set, so it has one too."""
    tokens = four_tokens(labels=labels)
    facts = tokens.facts()
    for form in ("share", "added", "balanced"):
        scale_N = torch.ones(4, requires_grad=True)
        loss_N = Objective(loss="selective", alpha_form=form).per_token(
            tokens.rest(scale_N, facts), scale_N, facts, 0.8
        )
        (grad_N,) = torch.autograd.grad(loss_N.sum(), scale_N)
        assert (loss_N > 0).all() and (grad_N != 0).all()


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_nothing_to_balance_is_an_error_and_not_nan(accuracy):
    tokens = four_tokens()
    facts = tokens.facts()
    with pytest.raises(ValueError, match="nothing to balance"):
        Objective(loss="selective", alpha_form="balanced").per_token(facts.top_N, facts.top_N, facts, accuracy)


@settings(max_examples=20, deadline=None)
@given(alpha=st.floats(0.05, 0.95), accuracy=st.floats(0.05, 0.95))
def test_law_balanced_is_share_at_another_alpha(alpha, accuracy):
    odds = alpha / (1 - alpha) * (accuracy / (1 - accuracy)) ** 2
    facts = four_tokens().facts()
    scale_N = torch.ones(4)
    rest_N = four_tokens().rest(scale_N, facts)
    balanced_N, share_N = (
        Objective(loss="selective", alpha=a, alpha_form=form).per_token(rest_N, scale_N, facts, accuracy).double()
        for a, form in ((alpha, "balanced"), (odds / (1 + odds), "share"))
    )
    torch.testing.assert_close(balanced_N / balanced_N.sum(), share_N / share_N.sum(), rtol=1e-4, atol=1e-6)
