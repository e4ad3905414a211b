"""Kept sets: what the names mean by hand, renormalisation, sets that do not belong, memory of ragged sets."""

from __future__ import annotations

import math
from array import array

import pytest
import torch

from rlalign.head import projection
from rlalign.logprobs import token_logprobs
from rlalign.logprobs.truncation import Truncation, kept_mask, kept_sets
from rlalign.rollout.engine.completions import kept_sets as kept_sets_of
from rlalign.types import KeptSets

D, V = 32, 500
CASES = [
    Truncation(top_p=0.9),
    Truncation(top_k=50),
    Truncation(min_p=0.05),
    Truncation(top_p=0.9, top_k=50),
    Truncation(top_p=0.95, min_p=0.02),
    Truncation(top_k=20, top_p=0.8, min_p=0.1),
]


def make(batch: int = 3, length: int = 12) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, length, D, generator=g).bfloat16()
    weight = (0.4 * torch.randn(V, D, generator=g)).bfloat16()
    mask = torch.rand(batch, length, generator=g) < 0.7
    mask[:, 0] = False
    ids = torch.randint(0, V, (batch, length), generator=g)
    ids[:, 1::2] = projection.project(hidden, weight).argmax(-1)[:, :-1:2]  # half of the tokens are in every set
    return hidden, weight, ids, mask


def by_hand(logits_V: list[float], truncation: Truncation) -> set[int]:
    """Min-p, then the k-th largest with its ties, then the fewest most probable ids whose sum exceeds top-p; float64."""
    weights = {i: math.exp(x) for i, x in enumerate(logits_V)}
    left = {i for i, w in weights.items() if w >= truncation.min_p * max(weights.values())}
    if truncation.top_k:
        edge = sorted((weights[i] for i in left), reverse=True)[: truncation.top_k][-1]
        left = {i for i in left if weights[i] >= edge}
    total, reached, kept = sum(weights[i] for i in left), 0.0, set()
    for i in sorted(left, key=lambda i: -weights[i]):
        if reached >= truncation.top_p * total:
            break
        kept.add(i)
        reached += weights[i]
    return kept


@pytest.mark.parametrize("truncation", CASES, ids=str)
def test_the_sets_are_those_that_the_names_mean(truncation: Truncation) -> None:
    logits = 3.0 * torch.randn(64, V, generator=torch.Generator().manual_seed(1))
    for row, mask in zip(logits, kept_mask(logits, truncation), strict=True):
        assert set(mask.nonzero()[:, 0].tolist()) == by_hand(row.tolist(), truncation)


def test_ties_of_the_kth_largest_stay() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    assert kept_mask(logits, Truncation(top_k=2)).tolist() == [[True, False, True, True, True, False]]
    assert kept_mask(logits, Truncation(top_k=99)).all() and kept_mask(logits, Truncation(top_p=1e-9)).sum() == 1


@pytest.mark.parametrize("truncation", CASES, ids=str)
@pytest.mark.parametrize("chunk", [None, 3])
def test_every_token_is_scored_over_its_own_set(truncation: Truncation, chunk: int | None) -> None:
    hidden, weight, ids, mask = make()
    found = kept_sets(hidden, weight, ids, mask=mask, truncation=truncation, temperature=0.7, chunk=chunk)
    logits = projection.project(hidden, weight)[:, :-1] / 0.7
    full = logits.double().log_softmax(-1)
    own = kept_mask(logits.flatten(0, 1), truncation).view(logits.shape)
    outside = torch.zeros_like(mask)
    outside[:, 1:] = ~own.gather(-1, ids[:, 1:, None])[..., 0]
    assert torch.equal(found.outside_BL, outside & mask) and 0 < found.outside_BL.sum() < mask.sum()
    want = own.scatter(-1, ids[:, 1:, None], True)
    assert torch.equal(found.kept.count_BL[:, 1:], want.sum(-1) * mask[:, 1:])
    assert bool(found.kept.holds(ids)[mask].all())
    mass = full.masked_fill(~want, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(found.log_mass_BL[:, 1:].double(), mass * mask[:, 1:], atol=2e-5, rtol=0)
    # without renormalisation a trainer is off by the log of the kept mass: no more, no less
    over_kept = token_logprobs(hidden, weight, ids, mask=mask, kept=found.kept, temperature=0.7)
    over_all = token_logprobs(hidden, weight, ids, mask=mask, temperature=0.7)
    torch.testing.assert_close(over_all - over_kept, found.log_mass_BL, atol=2e-5, rtol=0)


def test_captured_sets_have_the_last_word_and_are_compared() -> None:
    hidden, weight, ids, mask = make()
    options = {"mask": mask, "truncation": Truncation(top_k=50), "temperature": 0.7}
    own = kept_sets(hidden, weight, ids, **options)
    again = kept_sets(hidden, weight, ids, captured=own.kept, **options)
    inside = mask & ~own.outside_BL
    assert torch.equal(again.kept.ids_E, own.kept.ids_E)
    assert torch.equal(again.compared_BL, mask) and torch.equal(again.differ_BL, own.outside_BL)
    fewer = kept_sets(hidden, weight, ids, **options | {"truncation": Truncation(top_k=49)}).kept
    other = kept_sets(hidden, weight, ids, captured=fewer, **options)
    assert torch.equal(other.kept.ids_E, fewer.ids_E) and bool(other.differ_BL[inside].all())
    lost = other.differ_mass_BL[inside].double()
    expected = own.log_mass_BL[inside].double().exp() - other.log_mass_BL[inside].double().exp()
    torch.testing.assert_close(lost, expected, atol=2e-6, rtol=1e-3)
    unknown = KeptSets(ids_E=torch.zeros(0, dtype=torch.int32), count_BL=torch.zeros_like(ids))
    assert torch.equal(kept_sets(hidden, weight, ids, captured=unknown, **options).kept.ids_E, own.kept.ids_E)


def test_sets_beyond_the_limit_are_named_and_hold_no_ids() -> None:
    hidden, weight, ids, mask = make()
    options = {"mask": mask, "truncation": Truncation(top_p=0.9)}
    sizes = kept_sets(hidden, weight, ids, **options).kept.count_BL
    limit = int(sizes[mask].median())
    found = kept_sets(hidden, weight, ids, limit=limit, **options)
    assert torch.equal(found.too_large_BL, mask & (sizes > limit)) and found.too_large_BL.any()
    assert torch.equal(found.kept.count_BL, sizes.masked_fill(found.too_large_BL, 0))
    with pytest.raises(ValueError, match="have an empty kept set"):
        token_logprobs(hidden, weight, ids, mask=mask, kept=found.kept)


def test_sets_of_other_tokens_are_refused() -> None:
    hidden, weight, ids, mask = make()
    kept = kept_sets(hidden, weight, ids, mask=mask, truncation=Truncation(top_k=5)).kept
    with pytest.raises(ValueError, match="belong to other tokens"):
        token_logprobs(hidden, weight, ids.roll(1, 1), mask=mask, kept=kept)
    captured = {"mask": mask, "truncation": Truncation(top_k=5), "captured": kept}
    with pytest.raises(ValueError, match=r"kept_sets: a scored token.*belong to other tokens.*sequence 0, position"):
        kept_sets(hidden, weight, ids.roll(1, 1), **captured)
    with pytest.raises(ValueError, match="a count or an id is negative"):
        KeptSets(ids_E=kept.ids_E - V, count_BL=kept.count_BL)
    with pytest.raises(ValueError, match="sets of"):
        token_logprobs(hidden[:2], weight, ids[:2], mask=mask[:2], kept=kept)
    with pytest.raises(ValueError, match="as the counts"):
        KeptSets(ids_E=kept.ids_E[1:], count_BL=kept.count_BL)


def test_ragged_sets_are_cut_with_their_rows() -> None:
    hidden, weight, ids, mask = make()
    kept = kept_sets(hidden, weight, ids, mask=mask, truncation=Truncation(top_p=0.9)).kept
    few = kept.rows(torch.tensor([2, 0]), 7)
    dense = torch.zeros(3, 12, V, dtype=torch.bool)
    position = torch.arange(36).repeat_interleave(kept.count_BL.flatten())
    dense.view(36, V)[position, kept.ids_E.long()] = True
    want = dense[[2, 0], :7].nonzero()
    assert torch.equal(few.ids_E.long(), want[:, 2]) and torch.equal(few.count_BL, dense[[2, 0], :7].sum(-1))
    again = KeptSets.dense(torch.where(dense, torch.arange(V), -1))
    assert torch.equal(again.ids_E, kept.ids_E) and torch.equal(again.count_BL, kept.count_BL)


class Flat:
    """vLLM's flat logprobs of two tokens: the sampled one, then the likeliest three."""

    start_indices = (0, 4)
    token_ids = (7, 7, 2, 9, 5, 1, 5, 3)
    logprobs = (-0.2, -0.2, -1.7, -math.inf, -1.0, -0.5, -1.0, -3.0)


def test_a_captured_set_is_whole_only_where_something_is_left_out() -> None:
    ids, counts = kept_sets_of(Flat, 3)
    assert (list(ids), list(counts)) == ([7, 2], [2, 0])
    assert kept_sets_of(Flat, 0) == (array("i"), array("q"))
    with pytest.raises(RuntimeError, match="expected 3 for each"):
        kept_sets_of(Flat, 2)
