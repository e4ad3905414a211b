"""What a checkpoint's folder states beside its weights: sentence-transformers' files and the tokenizer's own.

Read in full or refused by name: a layer, a prompt or an activation that is passed over gives other numbers without a word.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from rlalign.scoring.params import Activation, PoolerDefaults

__all__ = ["FolderFacts", "activation_named", "folder_facts", "read"]

MODES = {"cls": "CLS", "mean": "MEAN", "lasttoken": "LAST"}
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


def activation_named(name: object) -> Activation:
    """sigmoid, softmax or identity from a class's dotted name. Raises ValueError on any other."""
    kind = str(name).rpartition(".")[2]
    if kind not in ACTIVATIONS:
        raise ValueError(
            f"activation function {name!r} of the checkpoint is not known; expected {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[kind]


def read(path: str, name: str, revision: str | None) -> str | None:
    """The text of a file of the checkpoint, None where it has no such file."""
    from transformers.utils import cached_file

    found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    if found is None:
        return None
    with open(found, encoding="utf-8") as file:
        return file.read()


def _json(path: str, name: str, revision: str | None) -> dict | list | None:
    text = read(path, name, revision)
    return None if text is None else json.loads(text)


def _prompt(path: str, stated: dict[str, object]) -> str:
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
    """Pooling and normalisation of a sentence-transformers folder, None for other folders."""
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
