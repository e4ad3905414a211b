"""Watch vLLM's own `load_weights`: what it makes of every published tensor, layer by layer, is what must be read back.

Names, fusing, transposes, reordered heads, padding and shards are the engine's business: its loaders run a second time, onto a
twin of the layer (same parameters, fresh memory), and `rlalign.rollout.worker.readback` compares the live layer with the twin.
So that the loaders cannot vouch for themselves, every piece that they are handed must consist of the published tensor's own
elements: a view of it, or the same elements in another order.
Memory: one layer's twin at a time.

vLLM's layerwise reload (0.28 to 0.33) is watched at two of its functions, `get_numel_loaded` (each call of a loader) and
`_layerwise_process` (a layer whose tensors are all there).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import BoundArguments
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import initialize_layerwise_reload, layerwise
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from rlalign.rollout.worker import readback
from rlalign.rollout.worker.readback import Expected
from rlalign.weights import digest
from rlalign.weights.digest import shuffled_sum

if TYPE_CHECKING:
    from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

Weights = Iterable[tuple[str, Tensor]]
NUMEL, PROCESS = layerwise.get_numel_loaded, layerwise._layerwise_process


@dataclass(slots=True)
class Source:
    """A published tensor on its way through `load_weights`."""

    name: str
    tensor: Tensor
    calls: int = 0
    pieces: list[Tensor] = field(default_factory=list)  # handed to loaders, and no view of it


class _DirectCopies(TorchFunctionMode):
    """Inside, the record hears of every `copy_` to the meta device."""

    def __init__(self, record: LoadRecord) -> None:
        super().__init__()
        self._record = record

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict[str, object] | None = None
    ) -> object:
        if function is Tensor.copy_ and args[0].is_meta and self._record.copied(args[0], args[1]):
            return args[0]
        return function(*args, **(kwargs or {}))


@dataclass
class LoadRecord:
    """One load of published tensors into the model, live, or dry: then the live layers keep what they compute with.

    offset: shifts the sampled columns. expected: what the layers that were filled must compute with. foreign: tensors in whose
    place a loader was handed other values. ignored: those that no loader was called for. partial: parameters of which only some
    parts came.
    """

    model: nn.Module
    offset: int
    dry: bool = False
    expected: list[Expected] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    _source: Source | None = None
    _owners: dict[int, str] = field(default_factory=dict)  # id of a call's arguments -> the tensor it belongs to
    _names: dict[int, str] = field(default_factory=dict)
    _direct: list[tuple[Tensor, Callable]] = field(default_factory=list)
    _open: dict[int, tuple[nn.Module, str]] = field(default_factory=dict)  # by storage: parameters that wait on meta
    _inside: bool = False  # a loader
    _taken: set[int] = field(default_factory=set)
    _mixers: dict[str, nn.Module] = field(default_factory=dict)  # that keep a view of their convolution's weight
    _views: list[tuple[nn.Module, Tensor]] = field(default_factory=list)  # mixers, and what their conv_weights must be
    _late: list[ParallelLMHead] = field(default_factory=list)

    def watch(self) -> None:
        """Begin: the model's layers must already be open for a reload."""
        self._names = {id(module): name for name, module in self.model.named_modules()}
        self._keep_late_biases()
        layerwise.get_numel_loaded, layerwise._layerwise_process = self._numel, self._process
        for module in self.model.modules():
            if "conv_weights" in (layerwise.get_layerwise_info(module).kernel_tensors or ({}, {}))[1]:
                self._mixers[self._names[id(module)]] = module
            for name, tensor in layerwise.get_layer_tensors(module).items():
                if tensor.is_meta:
                    self._open[tensor.untyped_storage()._cdata] = module, name
            for name in SKIP_LOAD_TENSORS & (module._parameters.keys() | module._buffers.keys()):
                if (tensor := getattr(module, name)) is not None:
                    self._watch_direct(module, name, tensor)

    def release(self) -> None:
        """End; vLLM's functions are as before. After a dry record the layers are closed as they were."""
        layerwise.get_numel_loaded, layerwise._layerwise_process = NUMEL, PROCESS
        for tensor, loader in reversed(self._direct):  # one tensor may have been watched in two modules
            tensor.weight_loader = loader
        self._direct.clear()
        for head in self._late:
            del head._register_bias
        self._late.clear()
        self._repair_views()
        if self.dry:
            self._close_untouched()

    def load(self, loader: Callable[[Weights], object], weights: Weights) -> None:
        """Have the engine's `load_weights` take these, watched."""
        with _DirectCopies(self):
            loader(self._passing(weights))

    def copied(self, target: Tensor, source: Tensor) -> bool:
        """A copy into an open parameter past its loader (GPT-OSS, vLLM 0.32), which vLLM's reload would lose: loaded instead.

        False where it is something else. Raises RuntimeError for a copy into a piece of a parameter.
        """
        found = None if self._inside else self._open.get(target.untyped_storage()._cdata)
        if found is None:
            return False
        layer, name = found
        parameter = getattr(layer, name)
        if target.shape != parameter.shape:
            raise RuntimeError(
                f"vLLM's {type(self.model).__name__}.load_weights writes a piece of {self._names[id(layer)]}.{name} past its "
                "loader; vLLM's layerwise reload loses it, so that rlalign cannot publish to this model"
            )
        parameter.weight_loader = default_weight_loader
        parameter.weight_loader = layerwise.make_online_process_loader(layer, name)
        parameter.weight_loader(parameter, source)
        return True

    def _passing(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """The weights as `load_weights` asks for them; whatever loaders do in between belongs to the last one."""
        for name, tensor in weights:
            self._source = Source(name, tensor)
            yield name, tensor
            self._judge()

    def problems(self, sent: Mapping[str, str]) -> list[str]:
        """What is wrong with the load itself. sent: {name: digest}; a tensor that came under two names may be left out once."""
        loaded = {found for name, found in sent.items() if name not in self.ignored}
        kind = type(self.model).__name__
        return [
            *(f"{name}: the engine computes with something else" for name in self.foreign),
            *(f"{n}: vLLM's {kind} has no place for it" for n in self.ignored if sent.get(n) not in loaded),
            *(
                f"{place}: only part of it came, the rest is nobody's; publish its parts together"
                for place in self.partial
            ),
        ]

    def proofs(self) -> dict[str, str]:
        """How each published tensor is proved; of a tensor in several layers the weakest counts."""
        order = {readback.BYTES: 0, readback.KERNEL: 1, readback.PACKED: 2}
        weakest: dict[str, str] = {}
        for expected in self.expected:
            for owner, _ in expected.owners:
                weakest[owner] = max(weakest.get(owner, expected.proof), expected.proof, key=order.__getitem__)
        return weakest

    def _judge(self) -> None:
        """Whether the loaders were handed the source's own elements."""
        source, self._source = self._source, None
        if source.calls == 0:
            self.ignored.append(source.name)
            return
        if source.pieces and not _made_of(source.pieces, source.tensor):
            self.foreign.append(source.name)

    def _numel(self, loader: Callable, args: BoundArguments) -> tuple[int, object]:
        """In place of vLLM's: note the call. A parameter that vLLM leaves in place (a bias) is written to only when not dry."""
        self._note(args)
        parameter = args.arguments.get("param")
        if self.dry and isinstance(parameter, Tensor) and not parameter.is_meta:
            args.arguments["param"] = readback.meta_like(parameter)
        self._inside = True
        try:
            return NUMEL(loader, args)
        finally:
            self._inside = False

    def _note(self, args: BoundArguments) -> None:
        source = self._source
        if source is None:
            raise RuntimeError(
                f"vLLM's {type(self.model).__name__}.load_weights collects tensors before it loads them, so that none can be "
                "proved to have landed; rlalign cannot publish to it"
            )
        source.calls += 1
        self._owners[id(args)] = source.name
        given = [v for k, v in args.arguments.items() if isinstance(v, Tensor) and k != "param"]
        for piece in given:
            if not _within(piece, source.tensor):
                source.pieces.append(piece)

    def _process(self, layer: nn.Module, info: LayerReloadingInfo) -> None:
        """In place of vLLM's: take down what this layer must compute with, and let vLLM fill it unless dry."""
        if id(layer) in self._taken:
            return
        found = self._take(layer, info)
        if self.dry:
            return
        PROCESS(layer, info)
        for expected in found:
            if expected.packed is not None:
                if readback.repack(expected):
                    self.repaired.append(expected.place)
                expected.packed = None

    def _take(self, layer: nn.Module, info: LayerReloadingInfo) -> list[Expected]:
        if not info.loaded_weights:
            return []
        self._taken.add(id(layer))
        name = self._names.get(id(layer), type(layer).__name__)
        twin = readback.Twin(layer, name, info, self.offset)
        for parameter, args in info.loaded_weights:
            twin.load(parameter, args, layerwise._get_original_loader, self._owners.pop(id(args)))
        found = twin.expected()
        self.expected += found + self._beside(name, twin, found)
        for expected in found if self.dry else ():
            expected.packed = None
        self.partial += [e.place for e in found if not e.whole]
        return found

    def _beside(self, name: str, twin: readback.Twin, found: list[Expected]) -> list[Expected]:
        """What a Mamba 2 mixer convolves with: a view of its layer's weight until that was packed, then memory of its own, which
        vLLM's reload (0.32 on CPU, bfloat16) leaves as it was.
        """
        path = name.rpartition(".")[0]
        mixer = self._mixers.get(path)
        if twin.unpacked is None or mixer is None:
            return []
        wanted = twin.unpacked.clone()
        self._views.append((mixer, wanted))
        owners = [owner for e in found if e.parameter == "weight" for owner in e.owners]
        return [Expected(f"{path}.conv_weights", mixer, "conv_weights", owners, digest=digest(wanted))]

    def _repair_views(self) -> None:
        for mixer, wanted in self._views if not self.dry else ():
            if not torch.equal(mixer.conv_weights, wanted):
                mixer.conv_weights.copy_(wanted)
                self.repaired.append(f"{self._names[id(mixer)]}.conv_weights")
        self._views.clear()

    def _keep_late_biases(self) -> None:
        """vLLM's transformers backend makes a new bias of the lm_head at every load; here the one that it has is loaded."""
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead) and module.bias is not None:
                module._register_bias = lambda: None
                self._late.append(module)

    def _watch_direct(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        """A tensor that vLLM's reload never opens (a router's correction bias): its loader writes into it at once."""
        loader = getattr(tensor, "weight_loader", default_weight_loader)
        place = f"{self._names[id(module)]}.{name}"

        def watched(param: Tensor, loaded_weight: Tensor, *args: object, **kwargs: object) -> object:
            source = self._source
            if source is not None:
                source.calls += 1
            twin = torch.empty_like(param.data)
            default_weight_loader(twin, loaded_weight)
            owner = source.name if source is not None else place
            self.expected.append(Expected(place, module, name, [(owner, None)], digest=digest(twin)))
            return None if self.dry else loader(param, loaded_weight, *args, **kwargs)

        self._direct.append((tensor, loader))
        tensor.weight_loader = watched

    def _close_untouched(self) -> None:
        """Take down what is still waiting, and give every layer back what it computed with."""
        for layer in self.model.modules():
            info = layerwise.get_layerwise_info(layer)
            if not info.can_load():
                continue
            if id(layer) not in self._taken:
                self._take(layer, info)
            layerwise._place_kernel_tensors(layer, info)
            info.reset()
        if hasattr(self.model, "_original_do_torchao_reload"):
            self.model._do_torchao_reload = self.model._original_do_torchao_reload


def dry_record(model: nn.Module, weights: Weights, *, offset: int) -> tuple[LoadRecord, list[str]]:
    """What the engine must compute with if it holds these weights, and the names that it does not know; nothing is loaded."""
    record, unknown = LoadRecord(model, offset, dry=True), []
    initialize_layerwise_reload(model)
    record.watch()
    try:
        for name, tensor in weights:
            try:
                record.load(model.load_weights, [(name, tensor)])
            except (ValueError, KeyError, AttributeError):  # vLLM's models answer an unknown name with one of these
                record._source = None
                unknown.append(name)
    finally:
        record.release()
    return record, unknown


def _made_of(pieces: list[Tensor], whole: Tensor) -> bool:
    """True where the pieces are the whole tensor's elements in another order; of a shard, where each is one of them."""
    own = whole.detach().to(pieces[0].dtype)
    if sum(piece.numel() for piece in pieces) == own.numel():
        return sum(map(shuffled_sum, pieces)) % 2**64 == shuffled_sum(own)
    return all(bool(torch.isin(piece, own).all()) for piece in pieces)


def _within(piece: Tensor, whole: Tensor) -> bool:
    """True for a view into the whole tensor's elements."""
    if piece.device != whole.device or piece.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        return False
    start = whole.data_ptr()
    return start <= piece.data_ptr() < start + max(1, whole.nbytes)
