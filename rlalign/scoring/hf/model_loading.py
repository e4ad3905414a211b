"""A transformers checkpoint as something that scores: its kind, backbone and head, and what its folder states beside them.

A model whose head is a module of its own (`score` of the decoders, a causal LM's lm_head) is run as backbone and head, so that
states before the head are there to return and to pack; any other (BERT, XLM-R, ModernBERT) is run whole.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from rlalign.head import widened
from rlalign.scoring.params import Activation, PoolerDefaults, Task
from rlalign.trainer import attention_choice

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MODES: dict[str, Literal["LAST", "MEAN", "CLS"]] = {"cls": "CLS", "mean": "MEAN", "lasttoken": "LAST"}
LEGACY = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "lasttoken"}
MODULES = {"Transformer", "Pooling", "Normalize", "Dropout"}  # the last does nothing when a model scores
ACTIVATIONS: dict[str, Activation] = {"Sigmoid": "sigmoid", "Softmax": "softmax", "Identity": "identity"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderFacts:
    """pooler: pooling and normalisation. activation: a CrossEncoder's. max_length: tokens of one input.

    prompt: put before every text that is embedded. side: the tokenizer's truncation_side, None where no file states it.
    """

    pooler: PoolerDefaults | None = None
    activation: Activation | None = None
    max_length: int | None = None
    prompt: str = ""
    side: str | None = None


def folder_facts(path: str, revision: str | None = None) -> FolderFacts:
    """Raises ValueError on a statement that this scorer cannot honour: an unknown module, pooling, activation or prompt."""
    stated = _json(path, "config_sentence_transformers.json", revision) or {}
    bert = _json(path, "sentence_bert_config.json", revision) or {}
    name = stated.get("activation_fn")
    return FolderFacts(
        pooler=_pooler(path, revision),
        activation=None if name is None else activation_named(name),
        max_length=bert.get("max_seq_length"),
        prompt=_prompt(path, stated),
        side=(_json(path, "tokenizer_config.json", revision) or {}).get("truncation_side"),
    )


def activation_named(name: Any) -> Activation:
    """sigmoid, softmax or identity from a class's dotted name. Raises ValueError on any other."""
    kind = str(name).rpartition(".")[2]
    if kind not in ACTIVATIONS:
        raise ValueError(
            f"activation function {name!r} of the checkpoint is not known; expected {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[kind]


def template_digest(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """sha256 of the chat template's text, None without one."""
    template = None if tokenizer is None else tokenizer.chat_template
    return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None


def read(path: str, name: str, revision: str | None) -> str | None:
    """The text of a file of the checkpoint, None where it has no such file."""
    from transformers.utils.hub import cached_file

    found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    if found is None:
        return None
    with open(found, encoding="utf-8") as file:
        return file.read()


def _json(path: str, name: str, revision: str | None) -> Any:
    text = read(path, name, revision)
    return None if text is None else json.loads(text)


def _prompt(path: str, stated: dict[str, Any]) -> str:
    name = stated.get("default_prompt_name")
    prompt = (stated.get("prompts") or {}).get(name) if name else None
    if not prompt:
        return ""
    if stated.get("model_type") == "CrossEncoder":
        raise ValueError(
            f"{path}: its default_prompt_name={name!r} puts {prompt!r} before a pair, which is not done here"
        )
    return str(prompt)


def _pooler(path: str, revision: str | None) -> PoolerDefaults | None:
    modules = _json(path, "modules.json", revision)
    if modules is None:
        return None
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if unknown := [
        f"{m.get('path') or m.get('name')} ({k})" for m, k in zip(modules, kinds, strict=True) if k not in MODULES
    ]:
        raise ValueError(
            f"{path}: modules.json has {', '.join(unknown)}, which this scorer does not compute, and scores without would be "
            f"wrong; it knows {', '.join(sorted(MODULES))}"
        )
    at = next(
        (
            str(module.get("path") or "1_Pooling")
            for module, kind in zip(modules, kinds, strict=True)
            if kind == "Pooling"
        ),
        None,
    )
    if at is None:
        return None
    pooling = _json(path, f"{at}/config.json", revision) or {}
    found = pooling.get("pooling_mode")
    if found is None:
        found = [LEGACY.get(key, key) for key, on in pooling.items() if key.startswith("pooling_mode") and on is True]
    found = [found] if isinstance(found, str) else list(found)
    if len(found) != 1 or found[0] not in MODES:
        raise ValueError(f"{path}: {at} asks for {found}; expected exactly one of {', '.join(MODES)}")
    return PoolerDefaults(pooling=MODES[found[0]], use_activation="Normalize" in kinds)


KINDS: dict[str, tuple[str, Task]] = {  # how an architecture's name ends -> which auto class loads it, and its task
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "classify"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token_classify"),
    "ForCausalLM": ("AutoModelForCausalLM", "generative"),
    "LMHeadModel": ("AutoModelForCausalLM", "generative"),
    "ForProcessRewardModel": ("AutoModel", "token_classify"),
    "RewardModel": ("AutoModel", "classify"),
    "ForMaskedLM": ("AutoModel", "embed"),
    "Model": ("AutoModel", "embed"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """task: what the checkpoint was made for. backbone: token ids to states. head: states to logits in float32.

    head None: the model is run whole, and its output is the logits (embedders: the states). facts: what its folder states.
    """

    id: str
    revision: str | None
    architecture: str
    task: Task
    model: PreTrainedModel
    backbone: nn.Module
    head: nn.Module | None
    tokenizer: PreTrainedTokenizerBase | None
    facts: FolderFacts

    @property
    def pooler(self) -> PoolerDefaults:
        """The checkpoint's choices."""
        return self.facts.pooler or PoolerDefaults()

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return cast("int", self.model.get_input_embeddings().num_embeddings)

    @property
    def scored(self) -> nn.Module:
        """The head of a model that has one."""
        if self.head is None:
            raise RuntimeError(f"{self.id}: this model is run whole and has no head of its own")
        return self.head

    @property
    def config(self) -> PreTrainedConfig:
        """Of the text model, where a config is nested."""
        return self.model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.model.device


def load(
    path: str, *, revision: str | None, dtype: str, device: str, attention: str, trust_remote_code: bool
) -> LoadedModel:
    """Load weights and tokenizer from a folder or a hub id. Raises ValueError on an architecture of no known kind."""
    import transformers
    from transformers.utils.hub import cached_file, extract_commit_hash

    config = transformers.AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    kind = attention_choice.choose(config.get_text_config().to_dict(), attention, on_cpu=device.startswith("cpu")).name
    architecture = (config.architectures or [type(config).__name__.replace("Config", "Model")])[0]
    auto, _ = _kind(architecture, config, path)
    model, report = getattr(transformers, auto).from_pretrained(
        path, revision=revision, dtype=dtype, attn_implementation=kind, trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )  # fmt: skip
    _check_loaded(path, architecture, model, report)
    tokenizer = None
    if any(read(path, name, revision) is not None for name in ("tokenizer_config.json", "tokenizer.json")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    facts = folder_facts(path, revision)
    revision = extract_commit_hash(cached_file(path, "config.json", revision=revision), None) or revision
    return wrap(model.to(device), tokenizer, id=path, revision=revision, architecture=architecture, facts=facts)


def wrap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    id: str,
    revision: str | None = None,
    architecture: str | None = None,
    facts: FolderFacts | None = None,
) -> LoadedModel:
    """A model in memory. A score head is copied to float32; a judge's lm_head stays shared and is multiplied in float32."""
    from torch import nn

    architecture = architecture or type(model).__name__
    _, task = _kind(architecture, model.config, id)
    model.eval()
    widened.decide_for(model)
    head = model.get_output_embeddings() if task == "generative" else None
    score = dict(model.named_children()).get("score")
    if task in ("classify", "token_classify") and isinstance(score, nn.Linear | nn.Sequential):
        head = copy.deepcopy(score).float()
    backbone = model if head is None else model.base_model
    if backbone is model and head is not None:
        raise ValueError(f"{id}: {architecture} has a head but no backbone of its own that could be run without it")
    return LoadedModel(
        id=id, revision=revision, architecture=architecture, task=task, model=model, backbone=backbone, head=head,
        tokenizer=tokenizer, facts=facts or FolderFacts(),
    )  # fmt: skip


def _kind(architecture: str, config: PreTrainedConfig, path: str) -> tuple[str, Task]:
    found = next((kind for ending, kind in KINDS.items() if architecture.endswith(ending)), None)
    if found is None or config.is_encoder_decoder:
        raise ValueError(
            f"{path}: {architecture} is not a model that can score; expected an architecture ending in {', '.join(KINDS)}, "
            "and no encoder-decoder"
        )
    return found


OF_OTHERS = ("position_ids", "inv_freq", "masked_bias", "attn.bias")  # buffers that older versions saved


def _check_loaded(path: str, architecture: str, model: PreTrainedModel, report: Mapping[str, Collection[str]]) -> None:
    """Raise ValueError on what transformers only warns of: a stand-in for the checkpoint's own code, weights made up at random,
    weights that the model has no place for."""
    if architecture.endswith("RewardModel") and type(model).__name__ != architecture:
        raise ValueError(
            f"{path}: {architecture} brings its own code and was loaded as a plain {type(model).__name__}, without its head; "
            "read that code, then pass trust_remote_code=True"
        )
    absent = sorted(
        name for name in report["missing_keys"] if not name.startswith("pooler.")
    )  # an embedder's pooler is not used
    if absent:
        raise ValueError(f"{path}: the checkpoint has no {', '.join(absent[:5])}; what transformers fills in is random")
    passed = OF_OTHERS if architecture.endswith(("ForCausalLM", "LMHeadModel")) else (*OF_OTHERS, "lm_head.weight")
    unused = sorted(name for name in report["unexpected_keys"] if not name.endswith(passed))
    if unused and not architecture.endswith("ForMaskedLM"):  # an embedder does not need that head
        raise ValueError(
            f"{path}: {architecture} has no place for the checkpoint's {', '.join(unused[:5])}; it was trained with them, and "
            "scores without would be others"
        )
