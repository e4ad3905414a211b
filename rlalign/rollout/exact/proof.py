"""What an engine that should be exact still computes with layers of vLLM's own."""

from __future__ import annotations

from torch import nn
from vllm.config import VllmConfig

# Classes of these names must be ours in an exact engine, scaled rope, other norms and routers among them
REPLACED = ("Linear", "LMHead", "RMSNorm", "RotaryEmbedding", "AndMul")


def attention(config: VllmConfig) -> list[str]:
    """Class of every attention layer's implementation, which is no module of its own."""
    layers = config.compilation_config.static_forward_context.values()
    return sorted({type(layer.impl).__qualname__ for layer in layers if hasattr(layer, "impl")})


def not_exact(model: nn.Module, config: VllmConfig) -> list[str]:
    """Classes that compute here and are not those of exact mode; empty in an engine that is exact."""
    classes = {type(m).__qualname__ for m in model.modules() if type(m).__qualname__.endswith(REPLACED)}
    return sorted(c for c in classes | set(attention(config)) if not c.startswith("Exact"))
