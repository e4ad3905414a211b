"""Small random reward models that vLLM runs too: its CPU attention wants heads of 32."""

from __future__ import annotations

from functools import cache

import torch

from rlalign.tiny_policy.tokenizer import byte_tokenizer
from tests.reward_models import pair_tokenizer

CONTEXT = 128
COMMON = {"vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "initializer_range": 0.2,
          "pad_token_id": 0}  # fmt: skip
DECODER = {**COMMON, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "bos_token_id": 1, "eos_token_id": 2,
           "max_position_embeddings": CONTEXT}  # fmt: skip
ENCODER = {**COMMON, "num_attention_heads": 2, "max_position_embeddings": CONTEXT}

MODELS = {  # kind -> (class, config's class, config)
    "one_label": ("LlamaForSequenceClassification", "LlamaConfig", {**DECODER, "num_labels": 1}),
    "three_labels": ("LlamaForSequenceClassification", "LlamaConfig", {**DECODER, "num_labels": 3}),
    "judge": ("Qwen3ForCausalLM", "Qwen3Config", DECODER),
    "embedder": ("Qwen3Model", "Qwen3Config", {**DECODER, "matryoshka_dimensions": [16, 32]}),
    "bert": ("BertForSequenceClassification", "BertConfig", {**ENCODER, "num_labels": 1}),
    "xlmr": ("XLMRobertaForSequenceClassification", "XLMRobertaConfig",
             {**ENCODER, "num_labels": 1, "type_vocab_size": 1, "max_position_embeddings": CONTEXT + 2,
              "bos_token_id": 1, "eos_token_id": 2}),
    "tagger": ("BertForTokenClassification", "BertConfig", {**ENCODER, "num_labels": 2}),
}  # fmt: skip
ENCODERS = {"bert", "xlmr", "tagger"}
TASKS = {"judge": "generative", "embedder": "embed", "tagger": "token_classify"}  # the others classify


@cache
def model_of(kind):
    import transformers

    name, config, fields = MODELS[kind]
    torch.manual_seed(sum(map(ord, kind)))
    model = getattr(transformers, name)(getattr(transformers, config)(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save(kind, folder) -> str:
    """A checkpoint folder in float32; XLM-R's tokenizer has no token types, BERT's has."""
    model_of(kind).save_pretrained(folder)
    tokenizer = pair_tokenizer(CONTEXT) if kind in ENCODERS else byte_tokenizer(CONTEXT)
    if kind == "xlmr":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return str(folder)
