"""byte_tokenizer(): the tokenizer of the tiny policies."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def byte_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: one token a byte, but one token for " + " and its like; prompts begin with <bos>.

    Decoding gives back any text exactly, characters it never met included.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    space = "\u0120"  # how byte-level BPE spells the byte 0x20
    merges = [pair for sign in "+-*/" for pair in ((space, sign), (space + sign, space))] + [(space, "=")]
    tokens = [PAD, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    core.add_special_tokens([PAD, BOS, EOS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
