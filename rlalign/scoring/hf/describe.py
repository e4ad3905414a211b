"""ModelInfo of a loaded model: read from its config, and measured with a few tokens where reading could be wrong.

Measured: whether attention is causal, how many columns the head has, whether packed items come out as they do alone, and
whether backbone plus head give the model's own logits (a mean over the tokens, a scale or a cap would be skipped: vllm#52158).
D hidden, L tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import msgspec
import torch

from rlalign.scoring.hf.forward_pass import Row, outputs, score_logits, vocabulary_logits
from rlalign.scoring.hf.model_loading import activation_named, template_digest
from rlalign.scoring.params import Activation, ModelInfo, PoolerDefaults, Task
from rlalign.trainer import attention_choice

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from rlalign.scoring.hf.model_loading import LoadedModel

STATIC_ROPE = {"default", "linear", "yarn", "llama3", "proportional"}  # no dependence on the row's length
TOLERANCE = {torch.float32: 1e-4}  # relative; bf16 and fp16 take 0.05, and a wrong mask is off by about 1


def describe(loaded: LoadedModel, pooler: PoolerDefaults | None) -> ModelInfo:
    """Everything a request is checked against. pooler: overrides what the checkpoint states."""
    config = loaded.config
    causal = _is_causal(loaded)
    pooler = pooler or loaded.pooler
    if pooler.pooling is None:
        pooler = msgspec.structs.replace(pooler, pooling="LAST" if causal else "CLS")
    num_labels = _num_labels(loaded)
    packing_reason = packing_refusal(loaded, causal=causal)
    _check_head(loaded)
    stated = loaded.model.config.to_dict()
    matryoshka = stated.get("matryoshka_dimensions") or (() if stated.get("is_matryoshka") else None)
    return ModelInfo(
        id=loaded.id,
        revision=loaded.revision,
        architecture=loaded.architecture,
        tasks=_tasks(loaded, pooler),
        vocab_size=loaded.vocab_size,
        hidden_size=config.hidden_size,
        num_labels=num_labels,
        activation=loaded.facts.activation or activation_of(loaded.model.config, num_labels),
        labels=label_names(loaded.model.config, num_labels),
        max_length=_max_length(loaded),
        dtype=_name(loaded.model.dtype),
        head_dtype=_name(torch.float32 if loaded.head is not None else loaded.model.dtype),
        causal=causal,
        exposes_hidden_states=loaded.task == "classify" and loaded.head is not None,
        hidden_states_reason=_hidden_states_refusal(loaded),
        packs=not packing_reason,
        packing_reason=packing_reason,
        matryoshka_dimensions=None if matryoshka is None else tuple(matryoshka),
        pooler=pooler,
        template_sha256=template_digest(loaded.tokenizer),
    )


def activation_of(config: PreTrainedConfig, num_labels: int) -> Activation:
    """What use_activation means for a classifier, by the rules of transformers, sentence-transformers and vLLM."""
    by_problem: dict[str, Activation] = {"regression": "identity", "multi_label_classification": "sigmoid"}
    plain: Activation = "sigmoid" if num_labels < 2 else "softmax"
    if config.problem_type in by_problem:
        return by_problem[config.problem_type]
    stated = config.to_dict()
    nested = stated.get("sentence_transformers") or {}
    name = nested.get("activation_fn") or stated.get("sbert_ce_default_activation_function")
    if name is None or config.problem_type is not None:
        return plain
    return activation_named(name)


def label_names(config: PreTrainedConfig, num_labels: int) -> tuple[str, ...]:
    """The names of the head's columns, in their order, from the config's id2label."""
    names: dict[Any, Any] = config.id2label or {}
    return tuple(str(names.get(k, f"LABEL_{k}")) for k in range(num_labels))


def packing_refusal(loaded: LoadedModel, *, causal: bool) -> str:
    """Why items cannot share a query exactly; empty where they can, which a few tokens then have to confirm."""
    config, model = loaded.config, loaded.model
    layers = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [part for part in rope.values() if isinstance(part, dict)] or ([rope] if rope else [])
    types = {str(part.get("rope_type", "default")) for part in ropes}
    if not causal:
        return "attention is bidirectional: the query's states depend on the item"
    if unmasked := layers - {"full_attention", "sliding_attention"}:
        return f"layers of type {', '.join(sorted(unmasked))} take no block mask"
    if not ropes:
        return "no rotary positions (learned absolute positions, ALiBi or none): an item's place in the row would show"
    if not types <= STATIC_ROPE:
        return f"rotary positions of type {', '.join(types - STATIC_ROPE)} depend on the length of the row"
    if any("mrope_section" in part for part in ropes):
        return "multi-axis rotary positions"
    if not model._supports_attention_backend:
        return "the model computes attention in its own way and may ignore a block mask"
    if config._attn_implementation not in ("sdpa", "flex_attention"):
        kinds = "flex_attention" if attention_choice.caps_scores(config.to_dict()) else "sdpa or flex_attention"
        return f"attention {config._attn_implementation!r} takes no block mask; load with {kinds}"
    if loaded.head is None and loaded.task != "embed":
        return "the model is run whole: its head gives one answer a row"
    error = _packing_error(loaded)
    if not error < TOLERANCE.get(model.dtype, 0.05):
        return f"measured: packed states differ from single ones by {error:.2g} (relative)"
    return ""


def window_of(config: PreTrainedConfig) -> int | None:
    """Tokens that a sliding-window layer sees, None without such layers."""
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    return None if window is None or (layers and "sliding_attention" not in layers) else int(window)


def attention_balance(loaded: LoadedModel) -> float | None:
    """The row length at which dense attention costs as much as the layers' products, in tokens; None where it is not dense.

    Two flops a parameter and token, against four a pair of tokens, head and head dimension. FlexAttention skips hidden blocks.
    """
    config = loaded.config
    if config._attn_implementation == "flex_attention":
        return None
    embedding = cast("Tensor", loaded.model.get_input_embeddings().weight).numel()
    parameters = sum(p.numel() for p in loaded.model.base_model.parameters()) - embedding
    per_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return parameters / (2 * config.num_hidden_layers * config.num_attention_heads * per_head)


def _tasks(loaded: LoadedModel, pooler: PoolerDefaults) -> tuple[Task, ...]:
    if loaded.task in ("classify", "token_classify"):
        return (loaded.task,)
    embedding: tuple[Task, ...] = ("embed", "token_embed")
    if loaded.task == "embed":
        return embedding
    steps: tuple[Task, ...] = ("token_classify",) if pooler.token_pooling == "STEP" else ()
    made_to_embed = loaded.pooler.pooling is not None
    return (*embedding, "generative", *steps) if made_to_embed else ("generative", *steps, *embedding)


def _hidden_states_refusal(loaded: LoadedModel) -> str:
    if loaded.task == "generative":
        return f"{loaded.architecture} is a CausalLM: it has no score head, so no state that belongs to a score"
    if loaded.head is None and loaded.task == "classify":
        return "this cross-encoder pools inside its own head (CrossEncodingPooler) and exposes no state before it"
    return "" if loaded.task == "classify" else f"a {loaded.task} model has no score per item to have a state for"


def _states(loaded: LoadedModel, ids: list[int]) -> Tensor:
    """Last hidden states [L, D] of one sequence, also of models that are otherwise run whole."""
    ids_1L = torch.tensor([ids], device=loaded.device)
    with torch.inference_mode():
        return loaded.model.base_model(input_ids=ids_1L, attention_mask=torch.ones_like(ids_1L)).last_hidden_state[0]


def _probe_ids(loaded: LoadedModel, count: int) -> list[int]:
    """Ordinary token ids, different from each other where the vocabulary allows."""
    return [(7 + 13 * i) % max(loaded.vocab_size - 1, 1) for i in range(count)]


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm(dim=-1).max() / b.float().norm(dim=-1).max())


def _is_causal(loaded: LoadedModel) -> bool:
    ids = _probe_ids(loaded, 7)
    before, after = (_states(loaded, [*ids[:4], last])[:4] for last in ids[-2:])
    return _relative(before, after) < TOLERANCE.get(loaded.model.dtype, 0.05)


def _packing_error(loaded: LoadedModel) -> float:
    """Largest relative distance of packed from single states, for a query and three items of different lengths."""
    ids = _probe_ids(loaded, 14)
    query, items = ids[:5], [ids[5:8], ids[8:9], ids[9:14]]
    row = Row(query=query, items=items)
    packed_LD = outputs(loaded, [row])[0]
    return max(
        _relative(packed_LD[start:end], _states(loaded, [*query, *item])[len(query) :])
        for item, (start, end) in zip(items, row.spans, strict=True)
    )


def _check_head(loaded: LoadedModel) -> None:
    """Raise ValueError where the model's own logits are not those of its head on the last state: it pools or transforms them."""
    if loaded.head is None:
        return
    pad, ids = loaded.config.pad_token_id, _probe_ids(loaded, 12)
    ids = [token for token in ids if token != pad]  # transformers looks for the last token that is none
    own, ours = [], []
    for length in (3, 5, 8, 10):
        states_LD = _states(loaded, ids[:length])
        with torch.inference_mode():
            logits = loaded.model(input_ids=torch.tensor([ids[:length]], device=loaded.device)).logits[0]
        own.append(logits.reshape(-1, logits.shape[-1])[-1])
        project = vocabulary_logits if loaded.task == "generative" else score_logits
        ours.append(project(loaded, states_LD[-1:])[0])
    own_PK, ours_PK = torch.stack(own).float(), torch.stack(ours).float()
    error = float((ours_PK - own_PK).norm(dim=-1).max() / own_PK.norm(dim=-1).max())
    if not error < max(TOLERANCE.get(loaded.model.dtype, 0.05), 1e-3):
        raise ValueError(
            f"{loaded.id}: the logits of {loaded.architecture} differ from its {'lm_' * (loaded.task == 'generative')}head's on "
            f"the last token by {error:.2g} (relative); it pools or transforms them in a way this scorer does not know, and scores "
            "without that would be wrong"
        )


def _num_labels(loaded: LoadedModel) -> int:
    """Columns of the score head, measured; 0 for models without one."""
    if loaded.task not in ("classify", "token_classify"):
        return 0
    row = Row(query=(), items=[_probe_ids(loaded, 3)])
    found = outputs(loaded, [row])
    return int((found if loaded.head is None else score_logits(loaded, found[0])).shape[-1])


def _max_length(loaded: LoadedModel) -> int | None:
    limits = [getattr(loaded.config, "max_position_embeddings", None), loaded.facts.max_length]
    for name, module in loaded.model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            reserved = -1 if module.padding_idx is None else module.padding_idx  # RoBERTa counts from padding_idx + 1
            limits.append(module.num_embeddings - reserved - 1)
    if loaded.tokenizer is not None and loaded.tokenizer.model_max_length < 10**9:
        limits.append(loaded.tokenizer.model_max_length)
    return min((int(limit) for limit in limits if limit), default=None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
