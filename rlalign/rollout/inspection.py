"""What a live engine holds, looked at without changing it: weights through their kernels, constants, tokenizer.

Unlike a publish, which would repair what it checks. Everything here is sent to the workers as a function, so that an engine which
was started long ago can be asked.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlalign.rollout.engine import VLLMEngine
from rlalign.weights import MANIFEST_KEY, MASTER_WEIGHT, WEIGHTS_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm.v1.worker.worker_base import WorkerWrapperBase

FREQUENCIES = "rotary frequencies"


def tokenizer(engine: VLLMEngine) -> PreTrainedTokenizerBase:
    """The tokenizer inside the engine."""
    return engine._llm.get_tokenizer()


def differing_weights(
    engine: VLLMEngine, weights: Iterable[tuple[str, Tensor]], *, shared: Path
) -> dict[int, list[str]]:
    """{rank: one line for every weight that this rank does not compute with}; empty lists where all are equal.

    weights: Hugging Face names and full tensors, as for a publish. Sampled columns of every row, through the kernels.
    """
    directory = Path(tempfile.mkdtemp(prefix="rlalign-inspect-", dir=shared))
    try:
        tensors = {n: t.detach().cpu().contiguous() for n, t in weights if n != MASTER_WEIGHT}
        save_file(
            tensors, directory / WEIGHTS_FILE, metadata={MANIFEST_KEY: json.dumps({"version": engine.policy_version})}
        )
        return dict(engine._llm.collective_rpc(_unlanded, args=(str(directory),)))
    finally:
        shutil.rmtree(directory)


def constants(engine: VLLMEngine) -> dict[str, list[float]]:
    """{module or FREQUENCIES: values} of the first rank: the epsilon of every norm, and what positions are rotated by."""
    return engine._llm.collective_rpc(_constants)[0]


def _unlanded(worker: WorkerWrapperBase, directory: str) -> tuple[int, list[str]]:
    with safe_open(Path(directory) / WEIGHTS_FILE, framework="pt") as file:
        version = json.loads(file.metadata()[MANIFEST_KEY])["version"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return worker.rank, worker._rlalign_unlanded(tensors, version)


def _constants(worker: WorkerWrapperBase) -> dict[str, list[float]]:
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

    found: dict[str, list[float]] = {}
    for name, module in worker.get_model().named_modules():
        if isinstance(module, RMSNorm):
            found[name] = [float(module.variance_epsilon)]
        elif isinstance(module, RotaryEmbeddingBase):
            cosine, sine = module.cos_sin_cache[1].float().chunk(2)  # of position 1: the frequencies themselves
            found[FREQUENCIES] = torch.atan2(sine, cosine).tolist()
    return found
