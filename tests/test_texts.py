"""What is read off a completion. Its text: what follows the prompt's own text, whole characters only, whatever the tokenizer."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from rlalign.rollout.engine.completions import RoutedExperts, said, texts
from rlalign.tiny_policy.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer(64)
CORE = TOKENIZER.backend_tokenizer


def byte_ids() -> list[int]:
    """The token of each byte. Byte-level BPE writes 188 bytes as themselves, the others as U+0100 and on (Radford et al. 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [CORE.token_to_id(chr(byte) if byte in plain else chr(256 + others.index(byte))) for byte in range(256)]


BYTE_IDS = byte_ids()


@settings(deadline=None)
@given(st.lists(st.text(max_size=6), min_size=2, max_size=2), st.lists(st.binary(max_size=12), max_size=3))
@example(["\ufffd", ""], [b"\xff", b"\xe2\x82", b"\xe2\x82\xac", b"\xffx"])
def test_bytes_become_what_python_decodes_without_what_is_not_whole_at_the_end(prompts, completions):
    sampled = [[[BYTE_IDS[byte] for byte in data] for data in completions]] * len(prompts)
    found = texts(CORE, [TOKENIZER.encode(prompt) for prompt in prompts], sampled)
    assert found == [[data.decode(errors="replace").rstrip("\ufffd") for data in completions]] * len(prompts)


@settings(deadline=None)
@given(st.text(max_size=12).filter(lambda text: not text.endswith("\ufffd")))
def test_what_was_encoded_comes_back_with_special_tokens_left_out(text):
    special = [TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id]
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert texts(CORE, [special], [[[*ids, *special], [*special, *ids]]]) == [[text, text]]


def test_the_token_that_stopped_it_is_no_text_even_where_it_has_one():
    assert said([5, 6, 7], "stop") == [5, 6] and said([5, 6, 7], "length") == [5, 6, 7] and said([], "stop") == []


@pytest.fixture(scope="module")
def sentencepiece_like() -> Tokenizer:
    """As Llama 2's: a space before a word is part of it, a text's first one is dropped; unknown characters are bytes."""
    vocabulary = {"<unk>": 0, "\u2581sum": 1, "\u2581is": 2, "!": 3} | {
        f"<0x{byte:02X}>": 4 + byte for byte in range(256)
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    space = decoders.Replace("\u2581", " ")
    tokenizer.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def test_a_completion_keeps_the_space_that_a_text_would_lose(sentencepiece_like):
    assert sentencepiece_like.decode([2, 3]) == "is!"
    assert texts(sentencepiece_like, [[1]], [[[2, 3], [1]]]) == [[" is!", " sum"]]


def test_a_character_that_was_whole_stays_when_the_next_byte_is_none(sentencepiece_like):
    euro, wrong = [4 + byte for byte in "\u20ac".encode()], 4 + 0xFF
    whole, first, both = [1, *euro], [1, *euro[:2]], [1, *euro, wrong, 3]
    assert sentencepiece_like.decode(both) == "sum" + 4 * "\ufffd" + "!"
    assert texts(sentencepiece_like, [[2]], [[whole, first, both]]) == [[" sum\u20ac", " sum", " sum\u20ac!"]]


def test_routes_that_the_engine_returns_are_those_of_the_mixtures_and_all_positions_or_an_error():
    about = {"layers": [1, 3], "k": 2, "wide": False, "returned": True}
    asked = []
    routed = RoutedExperts(lambda method: asked.append(method) or [about])
    rows = np.arange(5 * 4 * 2, dtype=np.uint8).reshape(
        5, 4, 2
    )  # [positions, decoder layers, K]; the first layer is dense
    routed.forget()
    found = routed.take(0)(SimpleNamespace(routed_experts=rows), 7, 6)
    assert found.tolist() == rows[:, [1, 3]].flatten().tolist() and routed.bytes_per_token == 4
    for short in (None, rows[:4]):
        with pytest.raises(RuntimeError, match=r"recorded [04] positions of a completion of 6 tokens; expected 5"):
            routed.take(0)(SimpleNamespace(routed_experts=short), 7, 6)
    assert asked == ["rlalign_routes_start"]  # nothing is asked of the workers again
