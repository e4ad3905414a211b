"""Read back what the engine computes with, and compare it with what was published.

A parameter that holds the new bytes proves little: on CPU vLLM multiplies by a packed copy, empties the parameter, and leaves
some packed copies stale (a tied lm_head after `reload_weights`). So linear layers are asked through their own kernel:
one-hot inputs make a matrix product return columns of the weight exactly, in any dtype and from any packing.

Suffixes: R rows (output features) of this rank, C columns (input features) of this rank, K sampled columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import blake3
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from rlalign.weights import digest

SAMPLED_COLUMNS = 16  # of every row, others at every version: the price of the proof is a product with this many rows


@dataclass(frozen=True, slots=True)
class Place:
    """Where a published tensor lives in the engine: a module, its parameter, and which of its fused parts."""

    module: nn.Module
    parameter: str
    part: int | None


def locate(model: nn.Module, name: str) -> Place | None:
    """Find a checkpoint name in vLLM's module tree, through fused projections. None when the name is unknown to it."""
    path, _, parameter = name.rpartition(".")
    if (module := _module(model, path)) is not None:
        return Place(module, parameter, None)
    parent, _, leaf = path.rpartition(".")
    for fused, parts in model.packed_modules_mapping.items():
        if leaf in parts and (module := _module(model, f"{parent}.{fused}")) is not None:
            return Place(module, parameter, parts.index(leaf))
    return None


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
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


@dataclass(frozen=True, slots=True)
class Expected:
    """What must be found at a place after a publish: all that is kept of a published tensor, on this rank.

    A linear layer's weight by sampled columns of every row (its kernel gives back no more at a bearable price), everything else,
    which the engine holds as it was loaded, by the digest of all its bytes.
    """

    name: str
    place: Place
    rows: slice
    columns_K: Tensor | None
    sample_KR: Tensor | None
    digest: str


def expect(name: str, place: Place, published: Tensor, *, offset: int, sent: str = "") -> Expected:
    """What this rank must compute with once `published` (the full tensor, all ranks) has been loaded at `place`.

    offset shifts the sampled columns, so that successive publishes visit all of them. Every row is always compared.
    sent: the digest of the full tensor, where it is known.
    """
    module, shard, rows = place.module, published, slice(None)
    if isinstance(module, LinearBase):
        shard, rows = _shard(
            module, published, place.part
        )  # of a weight, or of a bias, sharded like the rows of its weight
        if place.parameter == "weight":
            columns_K = _columns(shard.shape[1], offset)
            return Expected(name, place, rows, columns_K, shard[:, columns_K].t().contiguous(), "")
    elif isinstance(module, VocabParallelEmbedding) and place.parameter == "weight":
        first, last = module.shard_indices.org_vocab_start_index, module.shard_indices.org_vocab_end_index
        shard, rows = published[first:last], slice(last - first)
    whole = sent and shard.shape == published.shape
    return Expected(name, place, rows, None, None, sent if whole else digest(shard))


def differing(expected: Iterable[Expected]) -> tuple[list[str], str]:
    """Names of the tensors that the engine does not compute with, and one digest of what it does compute with at all places.

    The digest is the same on every engine with the same shard, weights and offset.
    """
    names, found = [], []
    through: tuple[Place, Tensor] | None = None  # parts of a fused projection share one pass through its kernel
    for e in expected:
        if e.sample_KR is not None:
            if through is None or through[0].module is not e.place.module:
                through = e.place, _through_kernel(e.place.module, e.columns_K) + 0  # a product may return -0.0 as 0.0
            held = through[1][:, e.rows].to(e.sample_KR.device)
            same, seen = torch.equal(held, e.sample_KR), digest(held)
        else:
            parameter = e.place.module.get_parameter(e.place.parameter)
            seen = digest(parameter[e.rows] if parameter.ndim else parameter)
            same = seen == e.digest
        found.append(f"{e.name} {seen}")
        if not same:
            names.append(e.name)
    return names, blake3.blake3("\n".join(found).encode()).hexdigest(length=16)


def landed(place: Place, published: Tensor, *, offset: int) -> bool:
    """True when the engine computes with `published` (the full tensor, all ranks) at this place on this rank."""
    return not differing([expect("", place, published, offset=offset)])[0]


def head_is_stale(lm_head: VocabParallelEmbedding, *, offset: int) -> bool:
    """True when the kernel behind vLLM's own lm_head projects with something other than `lm_head.weight`."""
    columns = _columns(lm_head.weight.shape[1], offset)
    return not torch.equal(_through_kernel(lm_head, columns), lm_head.weight[:, columns].t())


def _columns(count: int, offset: int) -> Tensor:
    stride = max(1, count // SAMPLED_COLUMNS)
    return torch.arange(offset % stride, count, stride)


def _through_kernel(module: nn.Module, columns_K: Tensor) -> Tensor:
    """[K, R]: the sampled columns of the weight that the module's kernel multiplies by; no bias, no all-reduce."""
    one_hot_KC = torch.zeros(
        len(columns_K), _input_size(module), dtype=module.params_dtype, device=module.weight.device
    )
    one_hot_KC[torch.arange(len(columns_K)), columns_K] = 1.0
    with torch.inference_mode():
        return module.quant_method.apply(module, one_hot_KC, bias=None)


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
