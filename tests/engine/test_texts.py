"""Our texts of completions against vLLM's own detokenizer, for the kinds of tokenizer that cut characters apart."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlalign.rollout.engine.completions import core_of, said, texts
from rlalign.tiny_policy.tokenizer import byte_tokenizer

CORPUS = [
    "the sum of 17 and 25 is 42, na\u00efve caf\u00e9s say",
    "\u4e09\u5341\u516d \U0001f600\U0001f680 \u20ac1.50 \ufffd \ufffd",
]
SPECIAL = ["<eos>", "<pad>"]


def byte_level() -> PreTrainedTokenizerFast:
    """Merges of bytes, some of them ending inside a character."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS * 4, trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: a word brings its space, a text loses its first, unknown characters are runs of bytes."""
    words = [
        "<unk>",
        *SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581sum",
        "\u2581of",
        "\u2581",
        "x",
        "\u20ac",
    ]
    vocabulary = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    space = decoders.Replace("\u2581", " ")
    core.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: pieces that join the word before them."""
    words = ["<unk>", *SPECIAL, "sum", "##s", "##ming", "of", ".", ","]
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


KINDS = {
    "tiny policy": byte_tokenizer(64),
    "byte level": byte_level(),
    "fallback": byte_fallback(),
    "pieces": word_piece(),
}


def vllms(tokenizer: PreTrainedTokenizerFast, prompt: list[int], tokens: list[int], finish_reason: str) -> str:
    """Token by token, as its output processor does."""
    from vllm import SamplingParams
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    request = SimpleNamespace(request_id="0", prompt_token_ids=prompt, sampling_params=SamplingParams())
    detokenizer = FastIncrementalDetokenizer(tokenizer, request)
    for i, token in enumerate(tokens):
        detokenizer.update([token], stop_terminated=finish_reason == "stop" and i == len(tokens) - 1)
    return detokenizer.get_next_output_text(finished=True, delta=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_what_vllm_makes_of_the_same_tokens(kind):
    tokenizer = KINDS[kind]
    core, token = core_of(tokenizer), st.integers(0, len(tokenizer) + 4)  # some rows of a model belong to no token

    @settings(deadline=None)  # the first call imports vLLM
    @given(st.lists(token, min_size=1, max_size=5), st.lists(token, max_size=9), st.sampled_from(["stop", "length"]))
    def holds(prompt, tokens, finish_reason):
        if core.decode(prompt).endswith("\ufffd"):
            prompt = tokenizer.encode("x", add_special_tokens=False)  # vLLM repeats a prompt that is cut off
        found = texts(core, [prompt], [[said(tokens, finish_reason)]])
        assert found == [[vllms(tokenizer, prompt, tokens, finish_reason)]]

    holds()
