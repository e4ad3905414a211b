"""Weights under the names and in the shapes in which a checkpoint has them: what an engine's loader expects.

transformers 5 renames and fuses weights as it loads (one tensor for all experts of a layer, Mixtral's `block_sparse_moe` as `mlp`);
its own way back, which `save_pretrained` takes, is taken here tensor by tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

LAYERS = ".layers."
_ALONE: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()  # networks seen before


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
