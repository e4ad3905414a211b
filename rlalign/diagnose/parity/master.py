"""An unrounded fp32 lm_head to project with when there is no optimizer: the checkpoint's own, or one that rounds to it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

# Any float this close (relative) to a bf16 number rounds to it, on either side of a power of two.
HALF_ULP = 2.0**-9


def unrounded(network: nn.Module, model: Path) -> tuple[Tensor, str]:
    """[V, D] float32 that rounds to the network's bf16 lm_head bit for bit, and where it comes from.

    A float32 checkpoint holds the real one. A bf16 checkpoint has lost it: then every weight is moved at random within what
    rounding takes away, which is how far an optimizer's copy would be. Raises RuntimeError should it not round back.
    """
    weight_VD = network.get_output_embeddings().weight.detach()
    master_VD, source = _saved(network, model), "the checkpoint's own float32 weight"
    if master_VD is None:
        generator = torch.Generator().manual_seed(0)
        share_VD = torch.rand(weight_VD.shape, generator=generator).to(weight_VD.device) * 2.0 - 1.0
        master_VD = weight_VD.float() * (1.0 + 0.98 * HALF_ULP * share_VD)
        source = "made up: bf16 weights moved within their rounding, as after optimizer steps"
    if not torch.equal(master_VD.to(weight_VD.dtype), weight_VD):
        raise RuntimeError(
            "parity: the float32 lm_head does not round to the network's weight; report the model's type"
        )
    return master_VD, source


def _saved(network: nn.Module, model: Path) -> Tensor | None:
    """The lm_head as the folder stores it, where that is float32."""
    from safetensors import safe_open

    lm_head = network.get_output_embeddings().weight
    names = {name for name, p in network.named_parameters(remove_duplicate=False) if p is lm_head}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in names & set(opened.keys()):
                tensor = opened.get_tensor(name)
                return tensor.to(lm_head.device) if tensor.dtype == torch.float32 else None
    return None
