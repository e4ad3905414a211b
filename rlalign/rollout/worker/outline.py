"""Which modules of the live engine compute what: in which order they run, what goes in and out, and whose weights they hold.

Attribution pairs the engine's modules with the trainer's by this, for any architecture that vLLM loads: the engine's own loader
says which module a checkpoint's weight ends in, and one forward says the rest.
R output features of this rank, C input features, K sampled columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from vllm.config import set_current_vllm_config

from rlalign.rollout.worker.load_record import dry_record
from rlalign.rollout.worker.readback import Expected


@dataclass
class Outline:
    """The modules of the first forward that ran: by name, in the order in which they began."""

    tokens: int = 0
    found: dict[str, dict[str, object]] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)

    def watch(self, model: nn.Module) -> None:
        """Hook every module. The model's own hook counts the tokens."""
        self.handles.append(model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True))
        for name, module in model.named_modules():
            if name:
                self.handles += [
                    module.register_forward_pre_hook(
                        lambda m, args, kwargs, name=name: self._enter(name, m, args, kwargs), with_kwargs=True
                    ),
                    module.register_forward_hook(lambda m, args, output, name=name: self._leave(name, output)),
                ]

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        positions = kwargs["positions"] if "positions" in kwargs else args[1]
        self.tokens = self.tokens or positions.shape[-1]

    def _enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        if name not in self.found:
            inputs = self._widths((*args, *kwargs.values()))
            self.found[name] = {"class": type(module).__name__, "inputs": inputs, "outputs": None}

    def _leave(self, name: str, output: object) -> None:
        about = self.found.get(name)
        if about is not None and about["outputs"] is None:
            about["outputs"] = self._widths(output if isinstance(output, tuple | list) else (output,))

    def _widths(self, values: tuple | list) -> list[tuple[int, int]]:
        """(place, features of one token) of what has as many rows as there are tokens."""
        return [
            (i, v.numel() // self.tokens)
            for i, v in enumerate(values)
            if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 1 and self.tokens in v.shape[:2]
        ]


class OutlineExtension:
    """RPCs of one worker."""

    rlalign_outline: Outline | None = None

    def rlalign_outline_start(self) -> dict[str, object]:
        """Watch the next forward."""
        self._rlalign_refuse_capture()
        self.rlalign_outline = Outline()
        self.rlalign_outline.watch(self.get_model())
        return {}

    def rlalign_outline_stop(self) -> dict[str, object]:
        """ "modules": {name: class, inputs and outputs as (place, features)} in their order."""
        outline, self.rlalign_outline = self.rlalign_outline, None
        for handle in outline.handles:
            handle.remove()
        return {"modules": outline.found}

    def rlalign_places(self, file: str) -> dict[str, object]:
        """ "places": {name of a safetensors file's tensor: (module, part)}, where its features are the module's in their order.

        part: which piece of a fused projection it is, None for the whole of it. A tensor whose features the engine keeps in another
        order, or in several modules, is left out.
        """
        names = {module: name for name, module in self.get_model().named_modules()}
        with safe_open(file, framework="pt") as tensors, set_current_vllm_config(self.vllm_config):
            weights = ((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118 (not a mapping)
            record, _ = dry_record(self.get_model(), weights, offset=0)
            places: dict[str, list] = {}
            for e in record.expected:
                for owner, rows_R in e.owners:
                    part = _part(e, rows_R, tensors.get_tensor(owner)) if owner in tensors.keys() else -1  # noqa: SIM118
                    places.setdefault(owner, []).append((names.get(e.module, ""), part))
        single = {owner: found[0] for owner, found in places.items() if len(found) == 1 and found[0][1] != -1}
        return {"places": single}


def _part(e: Expected, rows_R: Tensor | None, published: Tensor) -> int | None:
    """-1 where the features have no place of their own, or another order."""
    if e.sample_KR is None:
        return None if len(e.owners) == 1 else -1
    own_RK, whole = e.sample_KR.t()[rows_R], published.detach().to(e.sample_KR)
    if not _in_order(own_RK, whole, e) and not _in_order(own_RK, whole.t(), e):
        return -1
    sizes = list(getattr(e.module, "output_partition_sizes", ()))
    if bool(rows_R.all()):
        return (
            None if len(sizes) < 2 or e.module.tp_size == 1 else -1
        )  # of several ranks the pieces would come interleaved
    start, count = int(rows_R.nonzero()[0]), int(rows_R.sum())
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return starts.index(start) if start in starts and sizes[starts.index(start)] == count else -1


def _in_order(own_RK: Tensor, whole_RC: Tensor, e: Expected) -> bool:
    """Whether this rank's rows are consecutive rows of the whole. Where its inputs are a shard, all rows are here and summed up."""
    count, inputs = len(own_RK), getattr(e.module, "input_size_per_partition", e.module.input_size)
    if whole_RC.ndim != 2 or count > len(whole_RC) or inputs > whole_RC.shape[1]:
        return False
    if inputs < whole_RC.shape[1]:
        return count == len(whole_RC)
    seen_RK = whole_RC[:, e.columns_K]
    return any(torch.equal(seen_RK[i : i + count], own_RK) for i in range(0, len(whole_RC) - count + 1, count))


__all__ = ["Outline", "OutlineExtension"]
