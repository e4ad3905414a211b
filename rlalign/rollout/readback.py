"""Read back what the engine computes with, and compare it with what was published.

A parameter that holds the new bytes proves little: on CPU vLLM multiplies by a packed copy, empties the parameter, and leaves
some packed copies stale (a tied lm_head after `reload_weights`). So linear layers are asked through their own kernel:
one-hot inputs make a matrix product return columns of the weight exactly, in any dtype and from any packing.

Suffixes: R rows (output features) of this rank, C columns (input features) of this rank, K sampled columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

SAMPLED_COLUMNS = 64


@dataclass(frozen=True, slots=True)
class Place:
    """Where a published tensor lives in the engine: a module, its parameter, and which of its fused parts."""

    module: nn.Module
    parameter: str
    part: int | None


def locate(model: nn.Module, name: str) -> Place | None:
    """Find a checkpoint name in vLLM's module tree, through fused projections. None when the name is unknown to it."""
    path, _, parameter = name.rpartition(".")
    modules = dict(model.named_modules())
    if path in modules:
        return Place(modules[path], parameter, None)
    parent, _, leaf = path.rpartition(".")
    for fused, parts in model.packed_modules_mapping.items():
        if leaf in parts and f"{parent}.{fused}" in modules:
            return Place(modules[f"{parent}.{fused}"], parameter, parts.index(leaf))
    return None


def find_head(model: nn.Module) -> tuple[str, VocabParallelEmbedding]:
    """The name and module that the model's logits come from: its lm_head, or the input embedding that serves as one.

    Raises RuntimeError when that is not a single module.
    """
    named = {n: m for n, m in model.named_modules() if isinstance(m, VocabParallelEmbedding)}
    heads = {n: m for n, m in named.items() if isinstance(m, ParallelLMHead)} or named
    if len(heads) != 1:
        raise RuntimeError(
            f"{type(model).__name__}: expected one lm_head (or one embedding serving as it), found {sorted(heads)}"
        )
    return next(iter(heads.items()))


def vocabulary_shard(lm_head: VocabParallelEmbedding, full_VD: Tensor) -> Tensor:
    """This rank's rows of a full [vocabulary, D] tensor, padded with the zeros that vLLM pads the weight with."""
    first, last = lm_head.shard_indices.org_vocab_start_index, lm_head.shard_indices.org_vocab_end_index
    shard_VD = full_VD.new_zeros(lm_head.weight.shape)
    shard_VD[: last - first] = full_VD[first:last]
    return shard_VD


def landed(place: Place, published: Tensor, *, offset: int) -> bool:
    """True when the engine computes with `published` (the full tensor, all ranks) at this place on this rank.

    offset shifts the sampled columns, so that successive publishes visit all of them. Every row is always compared.
    """
    module = place.module
    if isinstance(module, LinearBase) and place.parameter == "weight":
        expected_RC, rows = _shard(module, published, place.part)
        columns = _columns(expected_RC.shape[1], offset)
        return torch.equal(_through_kernel(module, columns)[rows], expected_RC[:, columns])
    if isinstance(module, VocabParallelEmbedding) and place.parameter == "weight":
        first, last = module.shard_indices.org_vocab_start_index, module.shard_indices.org_vocab_end_index
        return torch.equal(module.weight[: last - first], published[first:last].to(module.weight.device))
    held = module.get_parameter(place.parameter)
    if isinstance(module, LinearBase):  # a bias, sharded like the rows of its weight
        published, rows = _shard(module, published, place.part)
        held = held[rows]
    return torch.equal(held, published.to(held.device))


def head_is_stale(lm_head: VocabParallelEmbedding, *, offset: int) -> bool:
    """True when the kernel behind vLLM's own lm_head projects with something other than `lm_head.weight`."""
    columns = _columns(lm_head.weight.shape[1], offset)
    return not torch.equal(_through_kernel(lm_head, columns), lm_head.weight[:, columns])


def _columns(count: int, offset: int) -> Tensor:
    stride = max(1, count // SAMPLED_COLUMNS)
    return torch.arange(offset % stride, count, stride)


def _through_kernel(module: nn.Module, columns_K: Tensor) -> Tensor:
    """[R, K]: the sampled columns of the weight that the module's kernel multiplies by; no bias, no all-reduce."""
    one_hot_KC = torch.zeros(
        len(columns_K), _input_size(module), dtype=module.params_dtype, device=module.weight.device
    )
    one_hot_KC[torch.arange(len(columns_K)), columns_K] = 1.0
    with torch.inference_mode():
        return module.quant_method.apply(module, one_hot_KC, bias=None).t()


def _input_size(module: nn.Module) -> int:
    return module.input_size_per_partition if isinstance(module, LinearBase) else module.embedding_dim


def _shard(module: LinearBase, published: Tensor, part: int | None) -> tuple[Tensor, slice]:
    """This rank's piece of the published tensor, and the rows of the module it belongs to."""
    if isinstance(module, RowParallelLinear):
        if published.ndim == 1:
            return published, slice(None)
        width = module.input_size_per_partition
        return published.narrow(1, module.tp_rank * width, width), slice(None)
    sizes = module.output_partition_sizes if part is not None else [sum(module.output_partition_sizes)]
    size, before = sizes[part or 0], sum(sizes[: part or 0])
    shards = published.shape[0] // size  # fewer than tp_size when key/value heads are replicated
    ranks_per_shard = max(1, module.tp_size // shards)
    start = (module.tp_rank // ranks_per_shard) * size
    return published.narrow(0, start, size), slice(before, before + size)
