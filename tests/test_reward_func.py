"""Conversations and reward functions: the chat template's own tokens, TRL's contract, None and a reason for what fails."""

import asyncio
import logging
from contextlib import contextmanager

import numpy as np
import pytest

from rlalign.scoring import HFScorer, ScoringParams
from rlalign.tiny_policy.tokenizer import byte_tokenizer
from tests.reward_models import CONTEXT, model_of, reference, scorer_of

TEMPLATE = "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
ASKED = [[{"role": "user", "content": "2 + 2?"}], [{"role": "user", "content": "3 + 3?"}]]
PROMPTS = [ASKED[0], ASKED[1], ASKED[0], ASKED[0]]
ANSWERS = [[{"role": "assistant", "content": text}] for text in ("4", "six", "four", "4 4 4")]


@pytest.fixture(scope="module")
def chatty():
    tokenizer = byte_tokenizer(CONTEXT)
    tokenizer.chat_template = TEMPLATE
    return HFScorer.wrap(model_of("one_label"), tokenizer, id="tiny/chatty")


def close(got, expected):
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(expected, np.float64), rtol=0, atol=1e-5)


@contextmanager
def counted(scorer):
    """The tokens that the model reads meanwhile."""
    read, run = [], scorer.run
    scorer.run = lambda requests: read.extend(r.num_tokens for r in requests) or run(requests)
    try:
        yield read
    finally:
        del scorer.run


def test_a_conversation_is_read_as_the_chat_template_writes_it(chatty):
    with counted(chatty) as read:
        result = chatty.score_conversations(PROMPTS, ANSWERS)
    for prompt, answer, score, tokens in zip(PROMPTS, ANSWERS, result.scores, result.prompt_tokens, strict=True):
        text = chatty.tokenizer.apply_chat_template(prompt + answer, tokenize=False)
        ids = chatty.tokenizer(text, add_special_tokens=False)["input_ids"]
        close(score, reference("one_label", ids).logits[0])
        assert tokens == len(ids)
    assert sum(read) < sum(result.prompt_tokens)  # three of them share a prompt, and its computation
    assert chatty.info.template_sha256 is not None


def test_answers_as_plain_strings_are_the_assistant_s(chatty):
    as_text = chatty.score_conversations(PROMPTS, [answer[0]["content"] for answer in ANSWERS])
    close(as_text.scores, chatty.score_conversations(PROMPTS, ANSWERS).scores)


def test_plain_texts_are_query_and_item(chatty):
    prompts, answers = ["2 + 2 =", "3 + 3 =", "2 + 2 ="], [" 4", " 6", " 5"]
    result = chatty.score_conversations(prompts, answers)
    close(result.scores, [chatty.score(p, a).scores[0] for p, a in zip(prompts, answers, strict=True)])


def test_what_cannot_be_scored_is_an_error_of_its_own(chatty):
    prompts, answers = ["2 + 2 ="] * 4, [" 4", "", " 5", "x" * CONTEXT]
    result = chatty.score_conversations(prompts, answers)
    close(result.scores[0], chatty.score("2 + 2 =", " 4").scores[0])
    close(result.scores[2], chatty.score("2 + 2 =", " 5").scores[0])
    assert "the item is empty" in result.errors[1] and f"reads at most {CONTEXT}" in result.errors[3]
    assert [r is None for r in result.rewards()] == [False, True, False, True]
    nothing = chatty.score_conversations(["a"], [""])
    assert nothing.rewards() == [None] and nothing.errors[0]


def test_states_and_masses_keep_their_places(chatty):
    result = chatty.score_conversations(
        ["a", "b", "a"], [" 1", "", " 2"], ScoringParams(return_pooled_hidden_states=True)
    )
    assert [state is None for state in result.pooled_hidden_states] == [False, True, False]
    weight = model_of("one_label").score.weight.detach()
    close(
        [state @ weight.T for state in result.pooled_hidden_states if state is not None],
        [result.scores[i] for i in (0, 2)],
    )


def test_a_request_that_is_wrong_as_a_whole_is_refused(chatty):
    with pytest.raises(ValueError, match="one completion a prompt, got 2 and 1"):
        chatty.score_conversations(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="temperature"):
        chatty.score_conversations(["a"], ["c"], ScoringParams(temperature=2.0))
    with pytest.raises(ValueError, match="pair 0: a text prompt with a chat completion"):
        chatty.score_conversations(["a"], ANSWERS[:1])
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        scorer_of("one_label").score_conversations(PROMPTS, ANSWERS)
    assert len(chatty.score_conversations([], [])) == 0


def test_a_cross_encoder_reads_pairs_and_no_chats():
    result = scorer_of("bert").score_conversations(["a", "b"], ["c", "d"])
    close(result.scores[1], scorer_of("bert").score("b", "d").scores[0])
    with pytest.raises(ValueError, match="a chat needs|not a chat"):
        scorer_of("bert").score_conversations(PROMPTS, ANSWERS)


def call(function, **columns):
    return asyncio.run(function(**columns))


def test_a_reward_function_gives_one_number_a_sample(chatty):
    function = chatty.as_reward_func()
    found = call(function, prompts=PROMPTS, completions=ANSWERS, completion_ids=[[1]] * 4, answer=["4"] * 4)
    close(found, np.concatenate(chatty.score_conversations(PROMPTS, ANSWERS).scores))
    assert function.__name__ == "chatty" and asyncio.iscoroutinefunction(function)


def test_a_sample_that_fails_is_none_and_told(chatty, caplog):
    metrics = {}
    with caplog.at_level(logging.WARNING, "rlalign.scoring"):
        found = call(
            chatty.as_reward_func(), prompts=["a"] * 4, completions=["b", "", "c", "d"], log_metric=metrics.__setitem__
        )
    assert [value is None for value in found] == [False, True, False, False]
    assert metrics == {"chatty/failed_frac": 0.25}
    assert "1 of 4 samples have no reward; sample 1: the item is empty" in caplog.text
    with pytest.raises(RuntimeError, match="1 of 4 samples have no reward; sample 1"):
        call(chatty.as_reward_func(on_error="raise"), prompts=["a"] * 4, completions=["b", "", "c", "d"])
    with pytest.raises(ValueError, match="on_error"):
        chatty.as_reward_func(on_error="zero")


def test_a_reward_of_several_labels_says_which():
    scorer = scorer_of("three_labels")
    with pytest.raises(ValueError, match="say which one with label_index"):
        call(scorer.as_reward_func(), prompts=["a"], completions=["b"])
    found = call(scorer.as_reward_func(label_index=1), prompts=["a"], completions=["b"])
    close(found, [scorer.score("a", "b").scores[0][1]])
