"""LoRA (peft) inside the trained network: the base frozen, adapters trained, their sum published.

The engine knows nothing of adapters: it is given merged weights, made one tensor at a time and never written into the network.
R rank, K inputs, M outputs of a linear layer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from peft.tuners.lora import Linear
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlalign import ranks
from rlalign.config import LoraConfig
from rlalign.trainer.checkpoint_names import gathered

ADAPTER = "default"  # peft's name of an only adapter
FOLDER = "adapter"  # inside a saved model's folder
LINEAR = (nn.Linear, Conv1D)
OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # that peft maps to fused experts

logger = logging.getLogger(__name__)


class Adapters:
    """The adapters of one network, put in by the constructor."""

    def __init__(self, network: nn.Module, config: LoraConfig, *, model: Path, seed: int) -> None:
        """Freeze the network and add adapters, the same ones on every rank. model: the folder it was loaded from.

        Raises ValueError where nothing matches the targets, or something else than a linear layer of the body.
        """
        head = network.get_output_embeddings()
        targets = adapted(network) if config.targets == ["all-linear"] else config.targets
        self._settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            use_rslora=config.rank_stabilised,
            lora_dropout=config.dropout,
            target_modules=targets,
            fan_in_fan_out=any(type(m) is Conv1D for m in network.modules()),
            base_model_name_or_path=str(model),
            task_type="CAUSAL_LM",
            inference_mode=True,  # of the saved one
        )
        self._network = network
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(self._settings, network, ADAPTER)
        self.layers = {name: m for name, m in network.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
        for name, layer in self.layers.items():
            if reason := _refusal(network, name, layer, head):
                raise ValueError(
                    f"trainer.lora.targets={config.targets}: {name} {reason}; target linear layers of the body"
                )
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(".lora_A." in name or ".lora_B." in name)

    def save(self, directory: Path) -> None:
        """Write them beside a saved model, from rank 0, as `peft.PeftModel.from_pretrained` reads them. Every rank must call it."""
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            with gathered(_pair(layer)):
                for kind, weight in zip(("lora_A", "lora_B"), _pair(layer), strict=True):
                    if ranks.rank() == 0:
                        tensors[f"base_model.model.{name}.{kind}.weight"] = weight.detach().to("cpu", copy=True)
        ranks.on_first(lambda: self._write(tensors, directory / FOLDER))

    def _write(self, tensors: dict[str, Tensor], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._settings.save_pretrained(folder)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the network is its base. By a scale of 0, not by leaving them out: ZeRO-3 expects the same modules every time."""
        scales = [layer.scaling[ADAPTER] for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.scaling[ADAPTER] = 0.0
        try:
            yield
        finally:
            for layer, scale in zip(self.layers.values(), scales, strict=True):
                layer.scaling[ADAPTER] = scale


def adapted(network: nn.Module) -> list[str]:
    """The linear layers that "all-linear" means: those of the body that can have an adapter. The log says what is left out.

    Fused experts and their routers are no linear layers, and peft takes the names of MLPs beside them for theirs; Mamba's fused
    kernels read the weight of `out_proj` past any adapter.
    """
    head = network.get_output_embeddings()
    fused = any(name.endswith("experts.gate_up_proj") for name, _ in network.named_parameters())
    found, left = [], []
    for name, module in network.named_modules():
        if type(module) in LINEAR and module is not head:
            taken = (fused and name.rpartition(".")[2] in OF_EXPERTS) or _read_past(network, name)
            (left if taken else found).append(name)
    if fused or left:
        kinds = sorted({name.rpartition(".")[2] for name in left} | ({"experts", "routers"} if fused else set()))
        logger.warning(
            "trainer.lora.targets=all-linear: no adapters in %s of %s", ", ".join(kinds), type(network).__name__
        )
    return found


def put_in(network: nn.Module, folder: Path) -> nn.Module:
    """The network with the adapters of a folder, unmerged, as the trainer computes with them."""
    peft.PeftModel.from_pretrained(network, folder, autocast_adapter_dtype=False)
    return network


def _read_past(network: nn.Module, name: str) -> bool:
    """True for a projection of a Mamba mixer that its kernels read as a weight: out_proj, and x_proj and dt_proj of Mamba 1."""
    mixer, _, leaf = name.rpartition(".")
    return (
        leaf in ("out_proj", "x_proj", "dt_proj") and {"A_log", "D"} <= network.get_submodule(mixer)._parameters.keys()
    )


def _refusal(network: nn.Module, name: str, layer: nn.Module, head: nn.Module) -> str:
    """Why this layer cannot have the adapter that was put into it; empty where it can."""
    base = layer.get_base_layer()
    if base is head:
        return "is the lm_head, whose product is not its own here"
    if type(layer) is not Linear or type(base) not in LINEAR:
        return "is no linear layer"
    return "is read by fused kernels past an adapter" if _read_past(network, name) else ""


def _pair(layer: Linear) -> list[nn.Parameter]:
    return [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
