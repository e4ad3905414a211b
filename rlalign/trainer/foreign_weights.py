"""Full tensors by their Hugging Face names out of a model in any wrapper: what a publish or a verification is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

__all__ = ["named_weights"]

# What wrappers put into the names of parameters: FSDP1, activation checkpointing, torch.compile, PEFT.
INFIXES = (
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
    "base_layer.",
    "modules_to_save.default.",
)


def named_weights(model: nn.Module, inner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors of `inner`, the transformers model inside `model`; a tied weight once.

    Shards are gathered (ZeRO-3, FSDP1, FSDP2): every rank must iterate to the end. PEFT's adapters are merged in float32 and
    rounded once to the base weight's dtype, without writing into the model. Each tensor is good until the next is asked for.
    """
    layers = {_plain(name): module for name, module in inner.named_modules() if hasattr(module, "base_layer")}
    for name, layer in layers.items():
        if not hasattr(layer, "lora_A") or any(getattr(layer, "use_dora", {}).values()):
            raise ValueError(
                f"{name} is a {type(layer).__name__}: only plain LoRA adapters are merged here; merge it yourself"
            )
    with _summoned(model):
        for name, parameter in inner.named_parameters():
            if ".lora_" in name or ".original_module." in name:
                continue  # an adapter's own; what a copy in modules_to_save stands for
            plain = _plain(name)
            path, _, leaf = plain.rpartition(".")
            layer = layers.get(path) if leaf == "weight" else None
            with _gathered(parameter) as whole:
                yield plain, (whole if layer is None else _merged(whole, layer)).detach()


def _plain(name: str) -> str:
    for infix in INFIXES:
        name = name.replace(infix, "")
    return name


@contextmanager
def _summoned(model: nn.Module) -> Iterator[None]:
    """Inside, FSDP1's parameters are whole, under their own names."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with ExitStack() as stack:
        if isinstance(model, FullyShardedDataParallel):
            stack.enter_context(FullyShardedDataParallel.summon_full_params(model, writeback=False))
        yield


@contextmanager
def _gathered(parameter: Tensor) -> Iterator[Tensor]:
    if hasattr(parameter, "ds_id"):  # DeepSpeed's own mark of a partitioned parameter
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.detach().to("cpu", copy=True)
    else:
        yield parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


@torch.no_grad()
def _merged(base: Tensor, layer: nn.Module) -> Tensor:
    if layer.merged:
        return base
    total = base.float()
    for adapter in layer.active_adapters:
        if adapter in getattr(layer, "lora_A", {}):
            a, b = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
            total = total + layer.scaling[adapter] * (b @ a)
    return total.to(base.dtype)
