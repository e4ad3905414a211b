"""The heads that read a temperature off the last hidden state: linear, MLP, one decoder layer, a constant; the official ones too.

Each takes hidden states [..., D] (the decoder layer: [B, L, D], right padded) and gives one raw number per position, 0
at initialisation, so T = 1. Parameter names and arithmetic are those of the official ATS code, so its checkpoints load.

B sequences, L padded length, D hidden, H heads, K key-value heads, E size of a head.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlalign.calibration.calibrators.calibration_file import ModelIdentity

Kind = Literal["constant", "linear", "mlp", "transformer"]
KINDS = ("constant", "linear", "mlp", "transformer")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """Which head, and how wide. None: intermediate_size 4 D, num_heads of 64 numbers or a few more, as many key-value heads.

    rope_theta, norm_eps: of the decoder layer. Raises ValueError on a shape that cannot be built.
    """

    kind: Kind
    hidden_size: int
    intermediate_size: int | None = None
    num_heads: int | None = None
    num_key_value_heads: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"head: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.hidden_size < 1 or self.width < 1:
            raise ValueError(f"head: sizes must be positive, got {self}")
        if self.kind == "transformer" and (
            self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2 or self.heads % self.key_value_heads
        ):
            raise ValueError(
                f"head: hidden_size {self.hidden_size} must be num_heads {self.heads} times an even head size, and "
                f"num_heads a multiple of num_key_value_heads {self.key_value_heads}"
            )

    @property
    def width(self) -> int:
        """Inner width of the MLP."""
        return 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size

    @property
    def heads(self) -> int:
        """Attention heads."""
        if self.num_heads is not None:
            return self.num_heads
        most = max(1, self.hidden_size // 64)
        fits = [n for n in range(most, 0, -1) if self.hidden_size % n == 0 and self.hidden_size // n % 2 == 0]
        return fits[0] if fits else 1

    @property
    def key_value_heads(self) -> int:
        """Key-value heads."""
        return self.heads if self.num_key_value_heads is None else self.num_key_value_heads


class TemperatureHead(nn.Module):
    """Standardised hidden state -> one raw number. The body of the head, if any, comes before one linear layer.

    constant: that layer's bias alone, one temperature for all; what every other head has to beat.

    centre_D, unit_D: mean and standard deviation of the fitted hidden states, so that one learning rate suits every
    model; 0 and 1 in converted checkpoints.
    """

    centre_D: Tensor
    unit_D: Tensor

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        d = shape.hidden_size
        self.register_buffer("centre_D", torch.zeros(d))
        self.register_buffer("unit_D", torch.ones(d))
        self.mlp = SwiGLU(d, shape.width) if shape.kind == "mlp" else None
        self.transformer = DecoderLayer(shape) if shape.kind == "transformer" else None
        self.linear = nn.Linear(d, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.linear.weight.requires_grad_(shape.kind != "constant")

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [...], float32. Raises ValueError on another width, or on a flat input to the decoder layer."""
        if hidden.shape[-1] != self.shape.hidden_size:
            raise ValueError(f"head: fitted on hidden states of {self.shape.hidden_size}, got {tuple(hidden.shape)}")
        x = (hidden.float() - self.centre_D) / self.unit_D
        if self.mlp is not None:
            x = self.mlp(x)
        if self.transformer is not None:
            if x.dim() != 3:
                raise ValueError(
                    f"head: a decoder layer reads whole sequences [B, L, D], got {tuple(hidden.shape)}; a pooled vector "
                    "has no context to attend to: use a linear or MLP head"
                )
            x = self.transformer(x)
        return self.linear(x)[..., 0]


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), without biases (arXiv 2002.05202)."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d, width, bias=False)
        self.up_proj = nn.Linear(d, width, bias=False)
        self.down_proj = nn.Linear(width, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """A Llama decoder layer: RMSNorm, causal attention with rotary positions, RMSNorm, SwiGLU, two residuals.

    Causal, so what lies to the right (padding) is never read. Positions count from 0.
    """

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.mlp = SwiGLU(shape.hidden_size, shape.width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD))
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions (arXiv 2104.09864), the two halves of a head paired."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.size_E = shape.hidden_size // shape.heads
        self.theta = shape.rope_theta
        d, key_value = shape.hidden_size, shape.key_value_heads * self.size_E
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, key_value, bias=False)
        self.v_proj = nn.Linear(d, key_value, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        q_BHLE, k_BKLE, v_BKLE = (
            projection(x_BLD).unflatten(-1, (-1, self.size_E)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos_LE, sin_LE = self._angles(x_BLD)
        out_BHLE = functional.scaled_dot_product_attention(
            _rotated(q_BHLE, cos_LE, sin_LE), _rotated(k_BKLE, cos_LE, sin_LE), v_BKLE, is_causal=True, enable_gqa=True
        )
        return self.o_proj(out_BHLE.transpose(1, 2).flatten(2))

    def _angles(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        position_L = torch.arange(x_BLD.shape[1], device=x_BLD.device, dtype=torch.float32)
        steps = torch.arange(0, self.size_E, 2, device=x_BLD.device, dtype=torch.float32)
        angle_LE = torch.outer(position_L, self.theta ** (-steps / self.size_E)).repeat(1, 2)
        return angle_LE.cos(), angle_LE.sin()


def _rotated(x: Tensor, cos_LE: Tensor, sin_LE: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos_LE + torch.cat((-second, first), dim=-1) * sin_LE


WEIGHTS = "calibration_head.safetensors"
OFFICIAL_KINDS: dict[str, Kind] = {
    "temperature": "constant",
    "linear": "linear",
    "mlp": "mlp",
    "transformer": "transformer",
}
BOUNDS = (0.1, 1e30)  # the official clip, and a number that no head reaches in place of "no upper end"


def read_official(folder: Path) -> tuple[TemperatureHead, ModelIdentity]:
    """The head and the model it was made for.

    Raises ValueError where files are missing, and for what this package does not compute: other features than the last
    hidden state, logits normalised first, Platt heads, weights that are not those of the head.
    """
    from safetensors.torch import load_file

    config_file, weights_file = folder / "config.json", folder / WEIGHTS
    if not config_file.is_file() or not weights_file.is_file():
        raise ValueError(
            f"{folder}: expected config.json and {WEIGHTS}; a pickled calibration_head.bin is not read, save it as "
            "safetensors first"
        )
    config = json.loads(config_file.read_text())
    kind = OFFICIAL_KINDS.get(config.get("calibration_type"))
    if kind is None:
        raise ValueError(
            f"{folder}: calibration_type {config.get('calibration_type')!r}, expected {', '.join(OFFICIAL_KINDS)}"
        )
    if config.get("feature_key", "hidden_states") != "hidden_states" or config.get("normalize_logits"):
        raise ValueError(f"{folder}: feature_key and normalize_logits must be 'hidden_states' and false, got {config}")
    shape = HeadShape(
        kind=kind,
        hidden_size=config["in_features"],
        intermediate_size=config.get("intermediate_size"),
        num_heads=config.get("num_attention_heads"),
        num_key_value_heads=config.get("num_key_value_heads"),
    )
    head = TemperatureHead(shape)
    tensors = _renamed(load_file(weights_file), shape)
    missing, unexpected = head.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if name not in ("centre_D", "unit_D")]  # ours: 0 and 1 leave states as they are
    if missing or unexpected:
        raise ValueError(f"{weights_file}: not the weights of this head; missing {missing}, unknown {unexpected}")
    return head, ModelIdentity(id=config.get("base_model_name_or_path"))


def _renamed(tensors: dict[str, Tensor], shape: HeadShape) -> dict[str, Tensor]:
    """Their names to ours; the scalar temperature, which divides, to the bias of a constant head."""
    if shape.kind != "constant":
        return {name.replace("linear_head.", "linear."): tensor.float() for name, tensor in tensors.items()}
    temperature = float(tensors["temperature"])
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{WEIGHTS}: temperature {temperature} is not positive: logits would be turned round")
    return {"linear.weight": torch.zeros(1, shape.hidden_size), "linear.bias": torch.tensor([-math.log(temperature)])}
