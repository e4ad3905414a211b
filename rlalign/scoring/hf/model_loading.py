"""A transformers checkpoint as something that scores: its kind, its backbone and its head.

A model whose head is a module of its own (`score` of the decoders, a causal LM's lm_head) is run as backbone and head, so that
states before the head are there to return and to pack; any other (BERT, XLM-R, ModernBERT) is run whole.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlalign.head import widened
from rlalign.scoring.hf.folder import FolderFacts, folder_facts, read
from rlalign.scoring.params import PoolerDefaults, Task
from rlalign.trainer import attention_choice

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

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
