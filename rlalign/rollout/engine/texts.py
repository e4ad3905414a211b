"""What completions say: the text vLLM makes of them, made of all at once instead of token by token.

vLLM decodes each token as it comes, and for every token's logprob entry once more; over short completions that was a tenth of
the time of `generate`. Nothing here needs a text before the end: no stop strings are offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # stands for bytes that are no UTF-8, or not yet


def core_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """What `texts` decodes with; None for a tokenizer written in Python, whose texts vLLM had better make itself."""
    from transformers import PreTrainedTokenizerFast

    return tokenizer.backend_tokenizer if isinstance(tokenizer, PreTrainedTokenizerFast) else None


def said(tokens: Sequence[int], finish_reason: str) -> Sequence[int]:
    """The tokens that become text: vLLM leaves out the one that stopped the completion."""
    return tokens[:-1] if finish_reason == "stop" else tokens


def texts(
    tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], sampled: Sequence[Sequence[Sequence[int]]]
) -> list[list[str]]:
    """The text of every completion `sampled[i][j]` of `prompts[i]`, without special tokens: what follows the prompt's own text.

    A character whose last bytes were not sampled is left out.
    """
    prompts = [list(prompt) for prompt in prompts]
    heads = tokenizer.decode_batch(prompts, skip_special_tokens=True)
    together = [[*prompt, *tokens] for prompt, of_prompt in zip(prompts, sampled, strict=True) for tokens in of_prompt]
    wholes = iter(tokenizer.decode_batch(together, skip_special_tokens=True))
    return [
        [_after(tokenizer, head, next(wholes), prompt, tokens) for tokens in of_prompt]
        for head, prompt, of_prompt in zip(heads, prompts, sampled, strict=True)
    ]


def _after(tokenizer: Tokenizer, head: str, whole: str, prompt: list[int], tokens: Sequence[int]) -> str:
    text = whole[len(head) :]
    if whole.startswith(head) and REPLACEMENT not in text:
        return text
    return _step_by_step(tokenizer, [] if head.endswith(REPLACEMENT) else prompt, tokens)


def _step_by_step(tokenizer: Tokenizer, prompt: list[int], tokens: Sequence[int]) -> str:
    """As vLLM does it: nothing of a token is kept before its bytes end in a whole character.

    Bytes that take back a character that was whole (byte fallback decodes a run of bytes all or nothing) begin anew.
    """
    from tokenizers.decoders import DecodeStream

    stream, found = DecodeStream(ids=prompt, skip_special_tokens=True), []
    for token in tokens:
        try:
            found.append(stream.step(tokenizer, token))
        except Exception as error:  # tokenizers raises nothing more particular
            if not str(error).startswith("Invalid prefix encountered"):
                raise
            stream = DecodeStream(skip_special_tokens=True)
            found.append(stream.step(tokenizer, token))
    return "".join(text for text in found if text is not None)
