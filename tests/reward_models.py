"""Tiny random reward models of every kind, in memory, with large weights so that scores differ by more than rounding."""

from __future__ import annotations

from functools import cache

import torch

from rlalign.tiny_policy.tokenizer import byte_tokenizer

CONTEXT = 2048


def pair_tokenizer(context=128):
    """A tokenizer in BERT's manner: [CLS] query [SEP] item [SEP], with token types; bytes as words."""
    from tokenizers import processors

    tokenizer = byte_tokenizer(context)
    core = tokenizer.backend_tokenizer
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A <eos> $B:1 <eos>:1", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


@cache
def tokenizer_of(kind):
    """Byte-level; with [CLS] and [SEP] for the encoders."""
    return pair_tokenizer() if kind in ENCODERS else byte_tokenizer(CONTEXT)


def _decoder(**more):
    return {
        "vocab_size": len(byte_tokenizer(CONTEXT)), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3, **more,
    }  # fmt: skip


def _encoder(**more):
    return {
        "vocab_size": len(byte_tokenizer(CONTEXT)), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "initializer_range": 0.3,
        "hidden_dropout_prob": 0.1, **more,
    }  # fmt: skip


def _gpt2(**more):
    return {
        "vocab_size": len(byte_tokenizer(CONTEXT)), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3, **more,
    }  # fmt: skip


KINDS = {  # name -> (class, config's class, config)
    "one_label": ("Qwen3ForSequenceClassification", "Qwen3Config", _decoder(head_dim=8, num_labels=1)),
    "three_labels": ("LlamaForSequenceClassification", "LlamaConfig", _decoder(num_labels=3)),
    "gemma": ("Gemma2ForSequenceClassification", "Gemma2Config",
              _decoder(head_dim=8, num_labels=2, query_pre_attn_scalar=8, sliding_window=16)),
    "mistral": ("MistralForSequenceClassification", "MistralConfig", _decoder(num_labels=1, sliding_window=16)),
    "gpt2": ("GPT2ForSequenceClassification", "GPT2Config", _gpt2(num_labels=1)),
    "bloom": ("BloomForSequenceClassification", "BloomConfig",
              {"vocab_size": 268, "hidden_size": 32, "n_layer": 2, "n_head": 4, "num_labels": 1, "pad_token_id": 0,
               "initializer_range": 0.3}),
    "jamba": ("JambaForSequenceClassification", "JambaConfig",
              _decoder(num_labels=1, attn_layer_offset=1, attn_layer_period=2, num_experts=2, mamba_d_state=4,
                       mamba_expand=1, use_mamba_kernels=False)),
    "process": ("Qwen2ForTokenClassification", "Qwen2Config", _decoder(num_labels=2)),
    "judge": ("Qwen3ForCausalLM", "Qwen3Config", _decoder(head_dim=8)),
    "capped_judge": ("Gemma2ForCausalLM", "Gemma2Config",
                     _decoder(head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=5.0)),
    "scaled_judge": ("CohereForCausalLM", "CohereConfig", _decoder(logit_scale=0.0625)),
    "embedder": ("Qwen3Model", "Qwen3Config", _decoder(head_dim=8, matryoshka_dimensions=[8, 16])),
    "bert": ("BertForSequenceClassification", "BertConfig", _encoder(num_labels=1)),
    "xlmr": ("XLMRobertaForSequenceClassification", "XLMRobertaConfig", _encoder(num_labels=1, type_vocab_size=2)),
    "bert_tagger": ("BertForTokenClassification", "BertConfig", _encoder(num_labels=2)),
    "bert_embedder": ("BertModel", "BertConfig", _encoder()),
}  # fmt: skip
ENCODERS = {"bert", "xlmr", "bert_tagger", "bert_embedder"}


@cache
def model_of(kind):
    """The transformers model, float32; the same object every time."""
    import transformers

    name, config, fields = KINDS[kind]
    torch.manual_seed(sum(map(ord, kind)))
    model = getattr(transformers, name)(getattr(transformers, config)(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # a zero bias or a norm of ones would hide that it is not applied
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@cache
def scorer_of(kind, packing="auto"):
    """HFScorer of `model_of(kind)`."""
    from rlalign.scoring import HFScorer

    return HFScorer.wrap(model_of(kind), tokenizer_of(kind), id=f"tiny/{kind}", packing=packing)


def saved(kind, folder):
    """Weights, config and tokenizer as a checkpoint folder."""
    model_of(kind).save_pretrained(folder)
    tokenizer_of(kind).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def reference(kind, ids, types=None):
    """What transformers gives for one sequence alone: the whole model's output."""
    more = {} if types is None else {"token_type_ids": torch.tensor([types])}
    return model_of(kind)(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), **more
    )


def words(count, seed, low=3):
    """`count` random token ids that are no special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 260, (count,), generator=generator).tolist()
