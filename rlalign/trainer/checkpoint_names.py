"""Weights of a model under the names and in the shapes in which a checkpoint has them: what an engine's loader expects.

transformers 5 renames and fuses weights as it loads (one tensor for all experts of a layer, Mixtral's `block_sparse_moe` as `mlp`);
its own way back, which `save_pretrained` takes, is taken here tensor by tensor. Models in wrappers are unwrapped first.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

__all__ = ["as_checkpoint", "gathered", "named_weights"]

LAYERS = ".layers."
_ALONE: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()  # networks seen before
# What wrappers put into the names of parameters: FSDP1, activation checkpointing, torch.compile, PEFT.
INFIXES = (
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
    "base_layer.",
    "modules_to_save.default.",
)


def as_checkpoint(network: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The network's weights as its checkpoint would have them. Memory: one tensor, or one layer where several make one.

    weights: in the network's own names and order.
    """
    if network not in _ALONE:
        _ALONE[network] = _each_alone(network)
    if _ALONE[network]:
        for name, tensor in weights:
            yield from revert_weight_conversion(network, {name: tensor}).items()
        return
    for _, group in groupby(weights, key=lambda named: _layer(named[0])):
        yield from revert_weight_conversion(network, dict(group)).items()


def _each_alone(network: nn.Module) -> bool:
    """True where every tensor has its own way back: all together give the same names and shapes as one by one."""
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in network.named_parameters()}
    empty = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    whole = {n: t.shape for n, t in revert_weight_conversion(network, empty).items()}
    single: dict[str, torch.Size] = {}
    for name, tensor in empty.items():
        single |= {n: t.shape for n, t in revert_weight_conversion(network, {name: tensor}).items()}
    return single == whole


def _layer(name: str) -> str:
    """Which decoder layer a weight belongs to; its own name outside of them."""
    before, found, after = name.partition(LAYERS)
    return f"{before}{found}{after.partition('.')[0]}" if found else name


def named_weights(model: nn.Module, inner: nn.Module, *, keep: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors of `inner`, the transformers model inside `model`; a tied weight once.

    Shards are gathered (ZeRO-3, FSDP1, FSDP2) one after another: every rank must iterate to the end. PEFT's adapters are merged in
    float32 and rounded once to the base weight's dtype, without writing into the model. keep: this rank reads them; what is
    gathered is copied to the CPU before it is let go. Raises ValueError for adapters other than plain LoRA.
    """
    layers = {_plain(name): module for name, module in inner.named_modules() if hasattr(module, "base_layer")}
    for name, layer in layers.items():
        more = [*getattr(layer, "use_dora", {}).values(), *getattr(layer, "lora_bias", {}).values()]
        if not hasattr(layer, "lora_A") or any(more) or len(getattr(layer, "lora_embedding_A", ())):
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
            adapters = [] if layer is None or layer.merged else [a for a in layer.active_adapters if a in layer.lora_A]
            parts = [parameter, *(side[a].weight for a in adapters for side in (layer.lora_A, layer.lora_B))]
            with gathered(parts):
                whole, *pairs = (p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in parts)
                if keep and adapters:
                    whole = _merged(whole, pairs, layer, adapters)
                elif keep and hasattr(parameter, "ds_id"):
                    whole = whole.to("cpu", copy=True)
            yield plain, whole


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


def gathered(parameters: list[Tensor]) -> AbstractContextManager:
    """Inside, parameters that ZeRO-3 partitions are whole; every rank must enter."""
    if not hasattr(parameters[0], "ds_id"):  # DeepSpeed's own mark of a partitioned parameter
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def _merged(base: Tensor, pairs: list[Tensor], layer: nn.Module, adapters: list[str]) -> Tensor:
    total = base.float()
    for name, a, b in zip(adapters, pairs[::2], pairs[1::2], strict=True):
        change = (b.float() @ a.float()) * layer.scaling[name]
        total = total + (
            change.t() if getattr(layer, "fan_in_fan_out", False) else change
        )  # as Conv1D holds its weight
    return total.to(base.dtype)
