"""What the ops of the live engine are given and give, call by call, for a few of its layers: the engine's side of the body's probe.

A token of a request is a row; (request, position, decoded) of every row is kept beside the values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from vllm.config import CompilationMode
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from rlalign.rollout.worker.capture import scheduled_rows

FORWARDS = 24  # that are recorded: a prefill of all requests and some decoding
ROWS = "rows"


@dataclass
class OpRecord:
    """One recording under way. values: {module: {place: a tensor per forward}}, where a place is in0, in1, ..., out0, ..."""

    runner: GPUModelRunner
    handles: list[RemovableHandle] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    values: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)
    requests: dict[str, int] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        """No further forward is recorded."""
        return len(self.rows) > FORWARDS

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        """Forward pre-hook of the model: which tokens the rows are."""
        numbered = self.requests
        self.rows.append(
            scheduled_rows(self.runner, args, kwargs, lambda name: numbered.setdefault(name, len(numbered)))
        )

    def take(self, name: str, side: str, value: object) -> None:
        """Keep the tensors of one call; the first of a forward, where several layers share a module."""
        if self.full or not self.rows:
            return
        count, tensors = len(self.rows[-1]), value if isinstance(value, tuple | list) else (value,)
        for at, tensor in enumerate(t for t in tensors if isinstance(t, Tensor) and t.ndim and len(t) >= count):
            kept = self.values.setdefault(name, {}).setdefault(f"{side}{at}", [])
            if len(kept) < len(self.rows):
                kept.append(tensor[:count].detach().clone())  # at once: vLLM's kernels overwrite their inputs


class OpRecordExtension:
    """RPCs of one worker that a mirrored body needs. State: the recording under way."""

    rlalign_ops: OpRecord | None = None

    def rlalign_ops_start(self) -> dict[str, object]:
        """Record the ops of the first two layers and the last, and the final norm, from now on.

        Raises RuntimeError where a trainer cannot follow them: a compiled model, tensor-parallel shards, adapters, another runner.
        """
        _refuse(self.vllm_config, self.model_runner)
        model, record = self.get_model(), OpRecord(self.model_runner)
        record.handles.append(model.register_forward_pre_hook(record.begin, with_kwargs=True))
        names = (n for n, m in model.named_modules(remove_duplicate=False) if kind_of(m) and _sampled(n, model))
        for module, name in {model.get_submodule(name): name for name in names}.items():  # layers share their rope
            record.handles += [
                module.register_forward_pre_hook(
                    lambda _, args, given, name=name: record.take(name, "in", (*args, *given.values())),
                    with_kwargs=True,
                ),
                module.register_forward_hook(lambda _, args, output, name=name: record.take(name, "out", output)),
            ]
        self.rlalign_ops = record
        return {"rank": self.rank}

    def rlalign_ops_stop(self, folder: str) -> dict[str, object]:
        """End the recording; answers its "file" and "modules": {name: what is known of it}. Every rank writes its own file."""
        record, self.rlalign_ops = self.rlalign_ops, None
        if record is None:
            raise RuntimeError("no recording of ops is under way in this engine; rlalign_ops_start begins one")
        for handle in record.handles:
            handle.remove()
        model, rows = self.get_model(), record.rows[:FORWARDS]
        tensors, modules = {}, {}
        for name, places in record.values.items():
            if any(len(each) < len(rows) for each in places.values()):
                continue  # not called in every forward
            tensors |= {f"{name}|{place}": torch.cat(each[: len(rows)]) for place, each in places.items()}
            modules[name] = _about(model.get_submodule(name)) | {"places": sorted(places)}
        tensors[ROWS] = torch.cat(rows) if rows else torch.zeros(0, 3, dtype=torch.int64)
        file = Path(folder) / f"ops-{self.rank}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        return {"rank": self.rank, "file": str(file), "modules": modules}


def kind_of(module: nn.Module) -> str:
    """Which op a module of vLLM computes: norm, rope, activation, linear, attention; empty for any other."""
    for kind, known in (("linear", LinearBase), ("rope", RotaryEmbeddingBase), ("attention", Attention)):
        if isinstance(module, known):
            return kind
    name = type(module).__name__
    return "norm" if name.endswith("Norm") else "activation" if name.endswith("AndMul") else ""


def _about(module: nn.Module) -> dict[str, object]:
    quantised = isinstance(module, LinearBase) and not isinstance(module.quant_method, UnquantizedLinearMethod)
    found: dict[str, object] = {"kind": kind_of(module), "class": type(module).__name__, "quantised": quantised}
    if isinstance(module, RotaryEmbeddingBase):
        found |= {"head_size": module.head_size, "interleaved": not module.is_neox_style}
    if isinstance(module, Attention):
        found |= {"heads": module.num_heads, "head_size": module.head_size}
    return found


def _sampled(name: str, model: nn.Module) -> bool:
    """Whether a module is outside of the layers, or in one that is recorded."""
    at = next((i for i, part in enumerate(name.split(".")) if part.isdigit()), None)
    if at is None:
        return True
    parts = name.split(".")
    layers = len(model.get_submodule(".".join(parts[:at])))
    return int(parts[at]) in (0, 1, layers - 1)


def _refuse(config: object, runner: object) -> None:
    why = ""
    if not isinstance(runner, GPUModelRunner):
        why = f"its model runner is {type(runner).__qualname__}; start it with VLLM_USE_V2_MODEL_RUNNER=0"
    elif config.compilation_config.mode != CompilationMode.NONE:
        why = "its model is compiled, so that no op can be called alone; start it with enforce_eager=True"
    elif config.parallel_config.tensor_parallel_size > 1:
        why = f"it is split over {config.parallel_config.tensor_parallel_size} ranks, whose sums round apart; use one"
    elif config.lora_config is not None:
        why = "it serves adapters, which a trainer's body has merged or apart; publish merged weights to an engine without LoRA"
    if why:
        raise RuntimeError(f"this engine's ops cannot be mirrored: {why}")
