"""VLLMScorer on real engines: the numbers of HFScorer, states before the head, failures that stay failures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlalign.scoring import HFScorer, ScoringParams, VLLMScorer
from tests.engine.scoring_models import CONTEXT, MODELS, TASKS, save

QUERY, ITEMS = "What is 2 + 2? ", ["4", "5, I would say", "It is four. " * 6, "?"]
LABELS = [60, 61, 62]
CLOSE = {"abs": 1e-5, "rel": 1e-5}


def start(folder, **options):
    return VLLMScorer.start(folder, **{"dtype": "float32", "max_model_len": CONTEXT, "max_num_seqs": 16} | options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save(kind, tmp_path_factory.mktemp(kind)) for kind in MODELS}


@pytest.fixture(scope="module")
def scorers(folders):
    """(VLLMScorer, HFScorer) of a kind, started when first asked for."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = (
                start(folders[kind], task=TASKS.get(kind, "classify")),
                HFScorer(folders[kind], dtype="float32"),
            )
        return made[kind]

    yield of
    for ours, _ in made.values():  # not earlier: engines of one process share vLLM's process groups
        ours.close()


@pytest.fixture(scope="module")
def plain(folders):
    """vLLM's own engine of a kind, without anything of ours."""
    from vllm import LLM

    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = LLM(
                folders[kind], runner="pooling", dtype="float32", max_model_len=CONTEXT, max_num_seqs=16,
                enforce_eager=True, disable_log_stats=True, use_tqdm_on_load=False,
            )  # fmt: skip
        return made[kind]

    return of


def params_of(kind, **more):
    judging = {"label_token_ids": LABELS, "min_label_mass": 0.0} if kind == "judge" else {}
    return ScoringParams(task=TASKS.get(kind, "classify"), **judging, **more)


def close(found, expected) -> None:
    assert [x.shape for x in found] == [x.shape for x in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("inputs", ["text", "ids", "no query"])
def test_the_same_numbers_as_transformers(scorers, kind, inputs):
    ours, theirs = scorers(kind)
    query, items = {"text": (QUERY, ITEMS), "ids": ([5, 6, 7], [[8], [9] * 40, [10, 11]]), "no query": ("", ITEMS)}[
        inputs
    ]
    for activated in (None,) if kind == "judge" else (None, True, False):
        a, b = (scorer.score(query, items, params_of(kind, use_activation=activated)) for scorer in (ours, theirs))
        assert a.errors == b.errors == [None] * len(items)
        close(a.scores, b.scores)
        assert a.prompt_tokens == b.prompt_tokens
        assert (a.logits == b.logits) if kind == "embedder" else close(a.logits, b.logits) is None
        assert a.label_mass == (None if b.label_mass is None else pytest.approx(b.label_mass, **CLOSE))
    assert np.ptp(np.concatenate([score.ravel() for score in a.scores])) > 0.01


@pytest.mark.parametrize("kind", MODELS)
def test_both_describe_the_model_alike(scorers, kind):
    ours, theirs = scorers(kind)
    for field in ("vocab_size", "hidden_size", "num_labels", "activation", "dtype", "causal", "template_sha256"):
        assert getattr(ours.info, field) == getattr(theirs.info, field), field
    assert ours.info.head_dtype == theirs.info.head_dtype == "float32"
    assert ours.info.tasks[0] in theirs.info.tasks
    assert ours.info.exposes_hidden_states == theirs.info.exposes_hidden_states


@pytest.mark.parametrize("kind", ["one_label", "three_labels"])
def test_states_before_the_head(scorers, kind):
    ours, theirs = scorers(kind)
    plain = ours.score(QUERY, ITEMS)
    asked = ours.score(QUERY, ITEMS, ScoringParams(return_pooled_hidden_states=True))
    expected = theirs.score(QUERY, ITEMS, ScoringParams(return_pooled_hidden_states=True))
    assert plain.pooled_hidden_states is None
    assert all((a == b).all() for a, b in zip(asked.logits, plain.logits, strict=True))  # bit by bit
    for a, b in zip(asked.pooled_hidden_states, expected.pooled_hidden_states, strict=True):
        assert a.device.type == "cpu" and a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    weight = theirs._loaded.model.score.weight
    for state, logits in zip(asked.pooled_hidden_states, asked.logits, strict=True):
        torch.testing.assert_close(weight @ state, torch.from_numpy(logits), atol=1e-5, rtol=1e-5)


def test_requests_with_and_without_states_share_a_batch(scorers):
    ours, _ = scorers("three_labels")
    wishes = [ScoringParams(return_pooled_hidden_states=i % 2 == 1) for i in range(6)]
    alone = [ours.score(QUERY, [f"{i}", "x"], wish) for i, wish in enumerate(wishes)]
    batched = ours.run([ours.prepare(QUERY, [f"{i}", "x"], wish) for i, wish in enumerate(wishes)])
    for one, other in zip(alone, batched, strict=True):
        close(other.logits, one.logits)
        assert (one.pooled_hidden_states is None) == (other.pooled_hidden_states is None)
        for a, b in zip(one.pooled_hidden_states or (), other.pooled_hidden_states or (), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("judge", "CausalLM"),
        ("bert", "cross-encoder"),
        ("xlmr", "cross-encoder"),
        ("embedder", "embed"),
        ("tagger", "token_classify"),
    ],
)
def test_states_are_refused_before_anything_runs(scorers, kind, why, monkeypatch):
    ours, _ = scorers(kind)
    monkeypatch.setattr(ours, "_outputs", lambda requests: pytest.fail("the engine ran"))
    with pytest.raises(ValueError, match=why):
        ours.score(QUERY, ITEMS, params_of(kind, return_pooled_hidden_states=True))


def test_a_users_own_engine_scores_but_has_no_states(scorers, plain):
    theirs, (ours, _) = VLLMScorer(plain("three_labels")), scorers("three_labels")
    a, b = theirs.score(QUERY, ITEMS), ours.score(QUERY, ITEMS)
    assert all((x == y).all() for x, y in zip(a.logits, b.logits, strict=True))
    with pytest.raises(ValueError, match=r"VLLMScorer\.start"):
        theirs.score(QUERY, ITEMS, ScoringParams(return_pooled_hidden_states=True))


def test_nothing_changes_for_requests_that_ask_for_nothing(scorers, plain):
    """Bit by bit, activated or not: an engine with our hook against vLLM's own answer on one without."""
    from vllm import PoolingParams

    ours, _ = scorers("three_labels")
    prompts = [{"prompt_token_ids": [*range(5, 5 + n)]} for n in (2, 9, 40)]
    for activated in (None, True, False):
        params = PoolingParams(use_activation=activated)
        a, b = (
            [o.outputs.data for o in llm.encode(prompts, params, pooling_task="classify", use_tqdm=False)]
            for llm in (ours._llm, plain("three_labels"))
        )
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_failed_request_is_an_error_where_vllm_gives_zero(scorers, monkeypatch):
    """vLLM's own LLM.score answers 0.0 for it, with the error beside it."""
    from vllm.outputs import PoolingOutput, PoolingRequestOutput, RequestError, ScoringRequestOutput

    ours, _ = scorers("one_label")
    real = ours._llm.encode

    def one_fails(prompts, params, **options):
        outputs = real(prompts, params, **options)
        failed = outputs[1]
        outputs[1] = PoolingRequestOutput(
            failed.request_id,
            PoolingOutput(torch.empty(0)),
            failed.prompt_token_ids,
            0,
            True,
            error=RequestError("oom", "no memory"),
        )
        assert ScoringRequestOutput.from_base(outputs[1]).outputs.score == 0.0
        outputs[2].outputs.data = torch.full((1,), float("nan"))
        return outputs

    expected = ours.score(QUERY, ITEMS).rewards()
    monkeypatch.setattr(ours._llm, "encode", one_fails)
    result = ours.score(QUERY, ITEMS)
    assert result.rewards() == [expected[0], None, None, expected[3]]
    assert result.errors[1] == "vLLM: no memory" and "not finite" in result.errors[2]


def test_inputs_are_checked_before_anything_runs(scorers, monkeypatch):
    ours, _ = scorers("one_label")
    monkeypatch.setattr(ours, "_outputs", lambda requests: pytest.fail("the engine ran"))
    for query, items, why in [
        (QUERY, ["x" * 300], "reads at most 128"), (QUERY, ["a", ""], "item 1 is empty"), (QUERY, [[5]], "all text or all token"),
        ([5], [[288]], "not a token id from 0 to 287"), ([5], [[True]], "not a token id"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=why):
            ours.score(query, items)


def test_truncation_keeps_the_last_tokens(scorers):
    ours, theirs = scorers("one_label")
    params = ScoringParams(truncate_prompt_tokens=20)
    a, b = (scorer.score(QUERY, ["x" * 300, "y"], params) for scorer in (ours, theirs))
    close(a.logits, b.logits)
    assert a.truncated == [True, False] and a.prompt_tokens == b.prompt_tokens == [20, 15]


def test_a_closed_scorer_says_so(scorers):
    """Last in this file: it takes the engines of this process with it."""
    scorer, _ = scorers("one_label")
    scorer.close()
    scorer.close()
    with pytest.raises(RuntimeError, match="closed"):
        scorer.score(QUERY, ITEMS)
