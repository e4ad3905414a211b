"""Which adapter a worker computes with: the live LoRA buffers of one id, layer by layer, against peft's files.

vLLM answers `add_lora` of an id it knows with what it has, and leaves out layers that its own target modules do not name; both are
silent. What a buffer should hold is made by the layer's own `set_lora` in fresh memory, so that packing and shards are the
engine's; names are vLLM's, scalings peft's (alpha / rank, with rank-stabilised adapters alpha / sqrt(rank), arXiv 2312.03732).

R rank of an adapter, C columns (inputs), M rows (outputs) of a layer.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm.lora.utils import parse_fine_tuned_lora_name

if TYPE_CHECKING:
    from vllm.lora.layers import BaseLayerWithLoRA
    from vllm.lora.model_manager import LoRAModelManager

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


@dataclass(slots=True)
class Pair:
    """One module's adapter as peft computes with it: `scaling` * b_MR @ a_RC."""

    a_RC: Tensor
    b_MR: Tensor
    scaling: float


class AdapterExtension:
    """The RPC of one worker about unmerged adapters."""

    def rlalign_adapter(self, folder: str, adapter: int) -> dict[str, object]:
        """Compare what this rank holds under an adapter's id with peft's files; nothing is loaded or repaired.

        Returns {"tensors", "bytes", "problems"}: matrices of the files, their size, and a line for each layer that differs; or
        {"unread"}: why the files cannot be compared.
        """
        manager = getattr(getattr(self.model_runner, "lora_manager", None), "_adapter_manager", None)
        if manager is None:
            return {
                "rank": self.rank,
                "problems": [],
                "unread": "it serves no adapters; start it with enable_lora=True",
            }
        try:
            pairs = read(Path(folder), getattr(manager.model, "hf_to_vllm_mapper", None))
        except (ValueError, OSError) as error:
            return {"rank": self.rank, "problems": [], "unread": str(error)}
        sizes = [t.nbytes for pair in pairs.values() for t in (pair.a_RC, pair.b_MR)]
        return {
            "rank": self.rank, "tensors": len(sizes), "bytes": sum(sizes),
            "problems": unlanded(manager, pairs, adapter),
        }  # fmt: skip


def read(folder: Path, mapper: Any = None) -> dict[str, Pair]:
    """{vLLM's name of a module: its pair}. Raises ValueError where the files hold something else than plain LoRA."""
    tensors, settings = load_file(folder / WEIGHTS), json.loads((folder / SETTINGS).read_text())
    if kinds := [name for name in ("use_dora", "lora_bias", "modules_to_save") if settings.get(name)]:
        raise ValueError(f"{folder}: {', '.join(kinds)} is set; only matrices A and B of plain LoRA can be compared")
    if mapper is not None and hasattr(mapper, "get_rename_mapper"):
        mapper = mapper.get_rename_mapper()
    sides: dict[str, dict[bool, Tensor]] = {}
    written: dict[str, str] = {}
    for name, tensor in tensors.items():
        if name.endswith(".base_layer.weight"):
            continue  # peft writes embeddings that it adapts beside their adapters; `verify` compares weights
        module, is_a = parse_fine_tuned_lora_name(name, mapper)
        sides.setdefault(module, {})[is_a] = tensor
        written[module] = re.sub(r"\.lora_(embedding_)?[AB](\.weight)?$", "", name.removeprefix("base_model.model."))
    if alone := [module for module, found in sides.items() if len(found) != 2]:
        raise ValueError(f"{folder}: {alone[0]} has one matrix of A and B, expected both")
    return {
        module: Pair(found[True], found[False], _scaling(settings, written[module], found[False].shape[1]))
        for module, found in sides.items()
    }


def _scaling(settings: Mapping[str, Any], module: str, rank: int) -> float:
    patterns = settings.get("alpha_pattern") or {}
    own = (value for key, value in patterns.items() if re.match(rf"(?:.*\.)?(?:{key})$", module))
    alpha = next(own, settings["lora_alpha"])
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def unlanded(manager: LoRAModelManager, pairs: Mapping[str, Pair], adapter: int) -> list[str]:
    """One line for each module whose buffers are not its pair's."""
    if adapter not in manager.lora_index_to_id:
        known = ", ".join(map(str, sorted(manager.list_adapters()))) or "none"
        return [f"adapter {adapter} is in no slot of this engine (loaded: {known}); add_lora brings it there"]
    slot, left, problems = manager.lora_index_to_id.index(adapter), dict(pairs), []
    for name, layer in manager.modules.items():
        parts = manager.packed_modules.get(name, [name])
        given = [left.pop(part, None) for part in parts]
        if hasattr(layer, "lora_a_stacked"):
            problems += _of_layer(name, parts, layer, slot, given)
        elif any(given):
            problems.append(f"{name}: adapters of {type(layer).__name__} cannot be read back; publish it merged")
    return problems + [f"{name}: the engine has no adapter layer of this name, and computes the base" for name in left]


def _of_layer(name: str, parts: list[str], layer: BaseLayerWithLoRA, slot: int, given: list[Pair | None]) -> list[str]:
    twin = copy.copy(layer)
    live = [_stacked(layer, slot, side) for side in "ab"]
    for side in "ab":
        fresh = [torch.zeros_like(t)[None] for t in _stacked(layer, slot, side)]
        setattr(twin, f"lora_{side}_stacked", tuple(fresh) if _tupled(layer) else fresh[0])
    if any(given):
        dtype = live[0][0].dtype
        a = [None if pair is None else pair.a_RC.to(dtype) for pair in given]
        b = [None if pair is None else pair.b_MR.to(dtype) * pair.scaling for pair in given]
        twin.set_lora(0, *((a, b) if len(parts) > 1 else (a[0], b[0])))
    wanted = [_stacked(twin, 0, side) for side in "ab"]
    named = parts if len(parts) == len(live[0]) else [f"{name}, slice {i}" for i in range(len(live[0]))]
    lines = (_difference(*matrices) for matrices in zip(*live, *wanted, strict=True))
    return [f"{part}: {line}" for part, line in zip(named, lines, strict=True) if line]


def _tupled(layer: BaseLayerWithLoRA) -> bool:
    return isinstance(layer.lora_a_stacked, tuple)


def _stacked(layer: BaseLayerWithLoRA, slot: int, side: str) -> list[Tensor]:
    """This slot's matrices, one for each of the layer's slices."""
    found = getattr(layer, f"lora_{side}_stacked")
    return [t[slot] for t in (found if isinstance(found, tuple) else (found,))]


def _difference(live_a: Tensor, live_b: Tensor, a: Tensor, b: Tensor) -> str:
    """How a slice differs from what it should hold; empty where it does not."""
    live_b, b = live_b.double(), b.double()
    same_a = torch.equal(live_a, a)
    if same_a and _close(live_b, b, a.dtype):
        return ""
    if not bool(b.any()):
        return "the trainer has no adapter here, the engine has one" if bool(live_b.any()) else ""
    if not bool(live_b.any()):
        return "the engine has no adapter here, the trainer has one"
    factor = float((live_b * b).sum() / (b * b).sum())
    if same_a and _close(live_b, factor * b, a.dtype):
        return f"the engine scales it by {factor:.4g} times what the trainer does"
    return f"the engine computes with another adapter (B differs by up to {float((live_b - b).abs().max()):.2g})"


def _close(live: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Equal to one rounding of the buffers' dtype: the scaling is multiplied into B."""
    return bool(((live - wanted).abs() <= 2 * torch.finfo(dtype).eps * wanted.abs()).all())
