"""The prefix law of chat templates: what keeps it, what breaks it and why, and prompts extended by ids."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlalign.tasks.prefix_law import CAUSES, check_prefix_law, extend

TURN = "<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\nOPEN{% endif %}"


def template(content: str = "m.content", *, before: str = "", opening: str = "") -> str:
    loop = "{% for m in messages %}" + TURN.replace("CONTENT", content) + "{% endfor %}"
    return before + loop + ASK.replace("OPEN", opening)


KEEPS = template()
STRIPS = template("m.content.split('</think>')[-1].lstrip() if m.role == 'assistant' else m.content")
TRIMS = template("m.content | trim")
REFRAMES = template(opening="<|im_start|>")
REWRITES = template(before="{{ messages | length }} messages\n")
BEGINS = template(before="{{ bos_token }}{{ bos_token }}")
CONVERSATION = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "<think>\neasy\n</think>\n\nfour "},
    {"role": "user", "content": "and 3 + 3?"},
    {"role": "assistant", "content": "six"},
    {"role": "user", "content": "thanks"},
]


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """One id per character, and one for "fo", so that a text has two encodings."""
    names = ["<s>", "<|im_start|>", "<|im_end|>", *(chr(c) for c in range(10, 127)), "fo"]
    core = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[("f", "o")]))
    core.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    special = {"bos_token": "<s>", "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def breaches(tokenizer, chat_template: str, messages=CONVERSATION, **options):
    tokenizer.chat_template = chat_template
    return check_prefix_law(tokenizer, messages, **options)


def test_a_template_that_only_adds_keeps_the_law(letters) -> None:
    assert breaches(letters, KEEPS) == []


@pytest.mark.parametrize(
    ("chat_template", "cause", "turns"),
    [
        (STRIPS, "stripped thinking", [1]),
        (TRIMS, "trimmed content", [1]),
        (REFRAMES, "answer framed otherwise", [1, 3]),
        (REWRITES, "history rewritten", [1, 3]),
    ],
)
def test_what_breaks_the_law_is_named(letters, chat_template: str, cause: str, turns: list[int]) -> None:
    found = breaches(letters, chat_template)
    assert [b.turn for b in found] == turns and {b.cause for b in found} == {cause}
    first = found[0]
    before = letters.apply_chat_template(CONVERSATION[:1], add_generation_prompt=True, return_dict=False)
    after = letters.apply_chat_template(CONVERSATION[:3], add_generation_prompt=True, return_dict=False)
    whole = [*before, *letters.encode(CONVERSATION[1]["content"], add_special_tokens=False)]
    assert whole[: first.position] == after[: first.position]
    assert (first.expected, first.found) == (whole[first.position], after[first.position])
    assert CAUSES[cause] in first.message()


def test_two_bos_tokens_are_named(letters) -> None:
    (first, _) = breaches(letters, BEGINS)
    assert (first.cause, first.position, first.found) == ("bos twice", 1, letters.bos_token_id)


def test_sampled_ids_that_text_encodes_otherwise_are_named(letters) -> None:
    answer = CONVERSATION[1]["content"]
    apart = [letters.convert_tokens_to_ids(c) for c in answer]  # "f", "o" where the tokenizer says "fo"
    found = breaches(letters, KEEPS, sampled={1: [*apart, letters.eos_token_id]})
    assert [(b.turn, b.cause) for b in found] == [(1, "re-tokenisation")]
    assert (letters.decode([found[0].expected]), letters.decode([found[0].found])) == ("f", "fo")


@pytest.mark.parametrize("chat_template", [KEEPS, STRIPS, TRIMS, REFRAMES, REWRITES])
@pytest.mark.parametrize("ended", [True, False])
def test_a_prompt_extended_by_ids_keeps_the_law_under_every_template(letters, chat_template: str, ended: bool) -> None:
    letters.chat_template = chat_template
    prompt = letters.apply_chat_template(CONVERSATION[:1], add_generation_prompt=True, return_dict=False)
    apart = [letters.convert_tokens_to_ids(c) for c in CONVERSATION[1]["content"]]
    ids = [*prompt, *apart, *([letters.eos_token_id] if ended else [])]
    longer = extend(letters, ids, CONVERSATION[:3])
    assert longer[: len(ids)] == ids
    added = letters.decode(longer[len(prompt) + len(apart) :])
    opening = "<|im_start|>" if chat_template == REFRAMES else ""
    new = "<|im_end|>\n<|im_start|>user\nand3+3?<|im_end|>\n<|im_start|>assistant\n"
    assert added.replace(" ", "") == new + opening


def test_what_cannot_be_checked_is_refused(letters) -> None:
    letters.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        check_prefix_law(letters, CONVERSATION)
    letters.chat_template = KEEPS
    with pytest.raises(ValueError, match="none of the 1 messages"):
        check_prefix_law(letters, CONVERSATION[:1])
    with pytest.raises(ValueError, match="no assistant's"):
        check_prefix_law(letters, CONVERSATION, sampled={2: [1]})
    with pytest.raises(ValueError, match="nothing was sampled"):
        extend(letters, [1], CONVERSATION[:1])
    letters.chat_template = template("'secret' if m.role == 'assistant' else m.content")
    with pytest.raises(ValueError, match="does not show the content"):
        extend(letters, [1], CONVERSATION[:3])
