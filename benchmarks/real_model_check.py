"""Before anything is started: is this folder a model that can be measured, and is there room for it?"""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model", "spiece.model")
GIB = 2**30
LIBRARIES = 3 * GIB  # torch, vLLM and DeepSpeed in their processes, and the smallest key/value cache
# Bytes for each parameter in the phase that holds most: fp32 master, two moments and gradient, bf16 weights on both sides.
TRAINING = 4 + 8 + 4 + 2 + 2
BATCHED = 1024  # tokens of one engine step
SAVED = 2 * 2  # bytes for each parameter: bf16 weights of the two steps that can be replayed
LOGITS = 8 * 4 * BATCHED  # bytes for each word: float32 logits of an engine step and what is made of them
ACTIVATIONS = 6 * 1024 * 10 * 4  # bytes: six recordings of 1024 tokens, about ten points a layer, four bytes


@dataclass(frozen=True, kw_only=True)
class About:
    """What is known of a folder before it is loaded. chat: its tokenizer has a template."""

    folder: Path
    architecture: str
    parameters: int
    vocabulary: int
    layers: int
    hidden: int
    tied: bool
    chat: bool
    on_gpu: bool

    def as_json(self) -> dict:
        return asdict(self) | {"folder": str(self.folder)}


def usable(folder: Path) -> About:
    """Raises ValueError for whatever keeps this folder from being measured."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not a Hugging Face folder: no config.json there. Give config.json, weights, tokenizer"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{folder}/config.json cannot be read: {_first_line(error)}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{folder} is no causal language model: transformers has none for model_type={config.model_type!r}"
        )
    named = [
        name
        for name in config.architectures or []
        if not name.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel"))
    ]
    if named:
        raise ValueError(f"{folder} holds a {named[0]}, not a causal language model: it has no lm_head to compare")
    if not [*folder.glob("*.safetensors")]:
        raise ValueError(f"{folder} has no *.safetensors; save the model with save_pretrained first")
    if not any(
        (folder / name).is_file() for name in VOCABULARIES
    ):  # transformers would make one of special tokens alone
        raise ValueError(f"{folder} has no tokenizer (none of {', '.join(VOCABULARIES)}); copy the model's files there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever a tokenizer class makes of missing files
        raise ValueError(
            f"{folder} has no tokenizer that loads ({_first_line(error)}); copy the model's tokenizer files there"
        ) from error
    import torch

    text = config.get_text_config()
    return About(
        folder=folder.resolve(),
        architecture=type(config).__name__.removesuffix("Config"),
        parameters=_parameters(folder),
        vocabulary=text.vocab_size,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        tied=bool(text.tie_word_embeddings),
        chat=tokenizer.chat_template is not None,
        on_gpu=torch.cuda.is_available(),
    )


def require_room(about: About, out: Path) -> None:
    """Raises ValueError where memory or disk are smaller than the largest phase is expected to need."""
    need = LIBRARIES + TRAINING * about.parameters + LOGITS * about.vocabulary
    have, where = _free_memory(about.on_gpu)
    if have < need:
        raise ValueError(
            f"{about.parameters / 1e6:,.0f} M parameters and {about.vocabulary:,} words need about {need / GIB:.1f} GiB, and "
            f"{have / GIB:.1f} GiB are free {where}; use a larger machine, --phase for the smaller ones, or --no-estimate to try"
        )
    folder = out
    while not folder.exists():
        folder = folder.parent
    need = (
        GIB + (4 + SAVED) * about.parameters + ACTIVATIONS * about.layers * about.hidden + 16 * 1024 * about.vocabulary
    )
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ValueError(
            f"about {need / GIB:.1f} GiB of disk are needed for activations and the run, {free / GIB:.1f} GiB are free at {folder}"
        )


def _parameters(folder: Path) -> int:
    """Elements of all tensors, from the headers."""
    from safetensors import safe_open

    found = 0
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="np") as opened:
                found += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
        except Exception as error:  # safetensors has an error class of its own
            raise ValueError(f"{file} is no whole safetensors file: {_first_line(error)}") from error
    return found


def _free_memory(on_gpu: bool) -> tuple[int, str]:
    import torch

    if on_gpu:
        return torch.cuda.mem_get_info()[0], "on the GPU"
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), "in memory"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
