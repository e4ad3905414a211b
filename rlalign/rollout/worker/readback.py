"""Read back what the engine computes with, and compare it with what its own loader made of the published tensors.

A parameter that holds the new bytes proves little: on CPU vLLM multiplies by a packed copy, empties the parameter, and leaves
some packed copies stale (a tied lm_head after `reload_weights`). So linear layers are asked through their own kernel:
one-hot inputs make a matrix product return columns of the weight exactly, in any dtype and from any packing. What a layer packs
into its own parameter (experts, convolutions of state-space layers) is compared with the same packing of fresh weights, and
everything else by all its bytes.

Suffixes: R rows (output features) of this rank, C columns (input features) of this rank, K sampled columns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import BoundArguments
from typing import TYPE_CHECKING

import blake3
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor, to_meta_tensor

from rlalign.weights import digest

if TYPE_CHECKING:
    from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

SAMPLED_COLUMNS = 16  # of every row, others at every version: the price of the proof is a product with this many rows
KERNEL, PACKED, BYTES = "kernel", "packed", "bytes"  # how a tensor is proved


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


@dataclass(slots=True)
class Expected:
    """What a parameter of this rank must be found to compute with after a load: all that is kept of the published tensors.

    place: the parameter's name in the engine. owners: the published tensors in it, with the rows each of them wrote (None: all).
    whole: no element was left unwritten, padding aside. Proved through the kernel by `sample_KR` (NaN: unwritten), or by `digest`
    of the parameter's bytes; with padding that nobody wrote by `values` (NaN there). packed: the parameter as a fresh engine
    would pack it, until the live one has been compared with it.
    """

    place: str
    module: nn.Module
    parameter: str
    owners: list[tuple[str, Tensor | None]]
    whole: bool = True
    proof: str = BYTES
    columns_K: Tensor | None = None
    sample_KR: Tensor | None = None
    values: Tensor | None = None
    digest: str = ""
    packed: Tensor | None = None


class Twin:
    """A layer with the same parameters in fresh memory, to which the engine's loaders are applied."""

    def __init__(self, layer: nn.Module, name: str, info: LayerReloadingInfo, offset: int) -> None:
        self.layer, self.name, self.offset = layer, name, offset
        self.twin = copy.copy(layer)
        self.twin.__dict__ = dict(layer.__dict__)
        self.twin._parameters, self.twin._buffers = dict(layer._parameters), dict(layer._buffers)
        self._device = info.restore_device
        self._written: dict[str, list[tuple[str, Tensor | None]]] = {}
        self._columns: dict[str, Tensor] = {}

    def load(self, parameter: str, args: BoundArguments, loader_of: Callable, owner: str) -> None:
        """Apply one call of a loader."""
        if parameter not in self._written:
            self._materialize(parameter)
            self._written[parameter] = []
        tensor, columns_K = getattr(self.twin, parameter), self._columns.get(parameter)
        before_R = None if columns_K is None else tensor[:, columns_K[0]].isnan()
        given, args.arguments["param"] = args.arguments["param"], tensor
        loader_of(tensor)(*args.args, **args.kwargs)
        args.arguments["param"] = given
        rows = None if before_R is None else before_R & ~tensor[:, columns_K[0]].isnan()
        self._written[parameter].append((owner, rows))

    def expected(self) -> list[Expected]:
        """What the live layer must compute with, by parameter."""

        def unwritten(name: str) -> Tensor:
            tensor, columns_K = getattr(self.twin, name), self._columns.get(name)
            return (tensor if columns_K is None else tensor[:, columns_K]).isnan()

        whole = {name: not unwritten(name).any() for name in self._written}
        plain = {name: getattr(self.twin, name) for name in self._written}
        packs = self._packs()
        found = [self._sampled(name, whole[name]) for name in self._columns]
        rest = [name for name in self._written if name not in self._columns]
        if packs and rest:
            self._pack()
        for name in rest:
            value = getattr(self.twin, name).data
            e = Expected(f"{self.name}.{name}", self.layer, name, list(dict.fromkeys(self._written[name])), whole[name])
            if packs:
                e.proof, e.packed = PACKED, value
            if whole[name]:
                e.digest = digest(value)
            else:
                e.values, e.whole = value, _only_padding(plain[name])
            found.append(e)
        return found

    @property
    def unpacked(self) -> Tensor | None:
        """What a convolution's packing keeps of the loaded weight (vLLM 0.32 on CPU, bfloat16); None for any other layer."""
        return self.twin.__dict__.get("_cpu_unpacked_conv_weight") if "weight" in self._written else None

    def _materialize(self, parameter: str) -> None:
        """Fresh memory for the parameter, with a mark wherever a loader will not have written."""
        current = getattr(self.layer, parameter)
        meta = current if current.is_meta else meta_like(current)
        with self._device:
            fresh = materialize_meta_tensor(meta)
        own = self.twin._parameters if parameter in self.twin._parameters else self.twin._buffers
        own[parameter] = fresh
        product = isinstance(self.layer, LinearBase) and parameter == "weight" and fresh.ndim == 2
        if product and fresh.is_floating_point():
            columns_K = self._columns[parameter] = _columns(fresh.shape[1], self.offset)
            fresh.data[:, columns_K] = torch.nan
        elif fresh.is_floating_point() and fresh.dtype.itemsize > 1:
            fresh.data.fill_(torch.nan)

    def _sampled(self, name: str, whole: bool) -> Expected:
        columns_K = self._columns[name]
        sample_KR = getattr(self.twin, name).data[:, columns_K].t().contiguous()
        place = f"{self.name}.{name}"
        return Expected(place, self.layer, name, self._written[name], whole, KERNEL, columns_K, sample_KR)

    def _packs(self) -> bool:
        """True for a layer that turns its loaded parameters into its kernel's own form, in the parameters themselves."""
        method = getattr(self.layer, "quant_method", None)
        if not isinstance(method, QuantizeMethodBase) or isinstance(self.layer, VocabParallelEmbedding):
            return False
        return not isinstance(self.layer, LinearBase) or ("weight" in self._written and "weight" not in self._columns)

    def _pack(self) -> None:
        """As at a fresh start: experts build their kernel and pack for it only the first time (vLLM 0.32 on CPU)."""
        method = copy.copy(self.layer.quant_method)
        if hasattr(method, "moe_kernel"):
            method.moe_kernel = None
        self.twin.__dict__.pop("_already_called_process_weights_after_loading", None)
        self.twin.quant_method = method
        method.process_weights_after_loading(self.twin)


def _only_padding(loaded: Tensor) -> bool:
    """True where the elements that nobody wrote are those that vLLM says no checkpoint has."""
    return int((~loaded.isnan()).sum()) >= getattr(loaded, "weight_loader_numel", loaded.numel())


def meta_like(tensor: Tensor) -> Tensor:
    """Its shape, dtype, class and loader, without its data."""
    return to_meta_tensor(tensor)


def repack(expected: Expected) -> bool:
    """Give the live parameter a fresh engine's packing where vLLM's reload left another. True when that was needed.

    vLLM 0.32 on CPU packs experts at start-up only: after a reload their kernel reads unpacked weights as packed ones.
    """
    live = getattr(expected.module, expected.parameter)
    if live.shape == expected.packed.shape and not _differs(live, expected.packed):
        return False
    if live.shape == expected.packed.shape:
        live.data.copy_(expected.packed)  # where graphs may have captured its address
    else:
        live.data = expected.packed.clone()
    return True


def differing(expected: Iterable[Expected]) -> tuple[list[str], str]:
    """Published tensors that the engine does not compute with, and one digest of what it does compute with at all places.

    The digest is the same on every engine with the same shard, weights and offset.
    """
    names, found = [], []
    for e in expected:
        if e.sample_KR is not None:
            held_KR = _through_kernel(e.module, e.columns_K, e.sample_KR.shape[1]).to(e.sample_KR.device)
            held_KR = torch.where(e.sample_KR.isnan(), 0, held_KR + 0)  # a product may return -0.0 as 0.0
            wrong_R = (held_KR != e.sample_KR.nan_to_num(0.0)).any(0)
            seen, wrong = digest(held_KR), bool(wrong_R.any())
            names += [owner for owner, rows_R in e.owners if wrong_R[rows_R].any()]
        else:
            live = getattr(e.module, e.parameter).data
            if e.values is not None:
                wrong = live.shape != e.values.shape or _differs(live, e.values)
                live = torch.where(e.values.isnan(), 0, live) if live.shape == e.values.shape else live
                seen = digest(live)
            else:
                seen = digest(live)
                wrong = seen != e.digest
            names += [owner for owner, _ in e.owners] if wrong else []
        found.append(f"{e.place} {seen}")
    return list(dict.fromkeys(names)), blake3.blake3("\n".join(sorted(found)).encode()).hexdigest(length=16)


def head_is_stale(lm_head: VocabParallelEmbedding, *, offset: int) -> bool:
    """True when the kernel behind vLLM's own lm_head projects with something other than `lm_head.weight`."""
    columns = _columns(lm_head.weight.shape[1], offset)
    held_KR = _through_kernel(lm_head, columns, lm_head.weight.shape[0])
    return not torch.equal(held_KR, lm_head.weight[:, columns].t())


def _columns(count: int, offset: int) -> Tensor:
    stride = max(1, count // SAMPLED_COLUMNS)
    return torch.arange(offset % stride, count, stride)


def _through_kernel(module: nn.Module, columns_K: Tensor, rows: int) -> Tensor:
    """[K, R]: the sampled columns of the weight that the module's kernel multiplies by; no bias, no all-reduce."""
    if isinstance(module, VocabParallelEmbedding):
        size = module.embedding_dim
    else:  # input features on this rank; a replicated layer has them all
        size = getattr(module, "input_size_per_partition", module.input_size)
    one_hot_KC = torch.zeros(len(columns_K), size, dtype=module.params_dtype, device=module.weight.device)
    one_hot_KC[torch.arange(len(columns_K)), columns_K] = 1.0
    with torch.inference_mode():
        return module.quant_method.apply(module, one_hot_KC, bias=None)[:, :rows]


def _differs(live: Tensor, wanted: Tensor) -> bool:
    """Whether bytes differ where the wanted ones are known (not NaN)."""
    known = ~wanted.isnan()
    return not torch.equal(live[known], wanted[known])
