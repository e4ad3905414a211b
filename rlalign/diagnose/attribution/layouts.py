"""Layouts of a layer beside the built-in one, as data: which is meant is told by what a layer of either side consists of.

Sandwich norms (Gemma 2 and 3, GLM-4), fused projections on both sides (Phi-3, GLM-4), norms after each part only (EXAONE 4), and
engines that run transformers' own modules (OLMo 2 and 3, SmolLM3), where a point has one name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlalign.diagnose.attribution.mapping import (
    BUILT_IN,
    EMBED,
    EXPECTED_CHILDREN,
    LAYER_PAIRS,
    MODEL_PAIRS,
    Pairs,
)

DROPOUTS = {"resid_attn_dropout", "resid_mlp_dropout"}  # Phi-3's, in the trainer alone


@dataclass(frozen=True, slots=True)
class Layout:
    """children: of a layer on both sides. rollout_has, trainer_has: what tells two layouts with the same children apart."""

    pairs: Pairs
    children: frozenset[str]
    rollout_has: str
    trainer_has: str

    def fits(self, rollout: set[str], trainer: set[str]) -> bool:
        """rollout, trainer: what is below layer 0 of each side."""
        tops = [{name.split(".")[0] for name in names} - DROPOUTS for names in (rollout, trainer)]
        return tops[0] == tops[1] == self.children and self.rollout_has in rollout and self.trainer_has in trainer


def _without(*points: str) -> dict[str, tuple[str, str]]:
    return {point: pair for point, pair in LAYER_PAIRS.items() if point not in points}


def _ordered(layer: dict[str, tuple[str, str]], after: str, point: str, module: str) -> dict[str, tuple[str, str]]:
    """The layer with one more point, whose module has the same name on both sides, behind another."""
    found = {}
    for name, pair in layer.items():
        found[name] = pair
        if name == after:
            found[point] = (module, module)
    return found


def _same(*modules: tuple[str, str]) -> dict[str, tuple[str, str]]:
    return {point: (module, module) for point, module in modules}


GEMMA = _ordered(LAYER_PAIRS, "attn_out", "attn_norm", "post_attention_layernorm") | {
    "mid_residual": ("pre_feedforward_layernorm output 1", "pre_feedforward_layernorm input"),
    "mlp_norm": ("pre_feedforward_layernorm", "pre_feedforward_layernorm"),
}
GEMMA = _ordered(GEMMA, "mlp_out", "mlp_post_norm", "post_feedforward_layernorm")
SCALED_EMBEDDING = MODEL_PAIRS | {EMBED: ("model.layers.0.input_layernorm input", "model.layers.0 input")}
GLM4 = _ordered(_without("gate", "up"), "attn_out", "attn_norm", "post_self_attn_layernorm")
GLM4 = _ordered(GLM4, "mlp_norm", "gate_up", "mlp.gate_up_proj")
GLM4 = _ordered(GLM4, "mlp_out", "mlp_post_norm", "post_mlp_layernorm")
PHI3 = _ordered(_without("q", "k", "v", "gate", "up"), "input_norm", "qkv", "self_attn.qkv_proj")
PHI3 = _ordered(PHI3, "mlp_norm", "gate_up", "mlp.gate_up_proj")
POST_NORMS = {
    **{p: LAYER_PAIRS[p] for p in ("q", "k", "v", "q_norm", "k_norm", "q_rope", "k_rope", "attention", "attn_out")},
    **_same(("attn_norm", "post_attention_layernorm"), ("mid_residual", "mlp input")),
    **{p: LAYER_PAIRS[p] for p in ("gate", "up", "activation", "mlp_out")},
    **_same(("mlp_post_norm", "post_feedforward_layernorm"), ("residual", ".")),
}  # fmt: skip
TRANSFORMERS = _same(
    ("input_norm", "input_layernorm"), ("q", "self_attn.q_proj"), ("k", "self_attn.k_proj"), ("v", "self_attn.v_proj"),
    ("q_norm", "self_attn.q_norm"), ("k_norm", "self_attn.k_norm"), ("attention", "self_attn.o_proj input"),
    ("attn_out", "self_attn.o_proj"), ("attn_norm", "post_attention_layernorm"), ("mid_residual", "mlp input"),
    ("gate", "mlp.gate_proj"), ("up", "mlp.up_proj"), ("activation", "mlp.down_proj input"), ("mlp_out", "mlp"),
    ("mlp_post_norm", "post_feedforward_layernorm"), ("residual", "."),
)  # fmt: skip
TRANSFORMERS_PRE = {
    **{p: pair for p, pair in TRANSFORMERS.items() if p not in ("attn_norm", "mlp_post_norm")},
    **_same(("mid_residual", "post_attention_layernorm input")),
}
TRANSFORMERS_PRE = _ordered(TRANSFORMERS_PRE, "mid_residual", "mlp_norm", "post_attention_layernorm")
OPTIONAL = {"q_norm", "k_norm", "input_norm", "mlp_post_norm"}

SANDWICH = EXPECTED_CHILDREN | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
AFTER = {"self_attn", "mlp", "post_attention_layernorm", "post_feedforward_layernorm"}


def _pairs(layer: dict[str, tuple[str, str]], model: dict[str, tuple[str, str]] = MODEL_PAIRS) -> Pairs:
    return Pairs(model=model, layer=layer, optional=OPTIONAL)


FUSED, APART = "self_attn.qkv_proj", "self_attn.q_proj"
LAYOUTS = (
    Layout(_pairs(GEMMA, SCALED_EMBEDDING), frozenset(SANDWICH), FUSED, APART),
    Layout(
        _pairs(GLM4),
        frozenset(EXPECTED_CHILDREN | {"post_self_attn_layernorm", "post_mlp_layernorm"}),
        FUSED,
        "mlp.gate_up_proj",
    ),
    Layout(_pairs(PHI3), frozenset(EXPECTED_CHILDREN), FUSED, FUSED),
    Layout(_pairs(POST_NORMS), frozenset(AFTER), FUSED, APART),
    Layout(_pairs(TRANSFORMERS), frozenset(AFTER), APART, APART),
    Layout(_pairs(TRANSFORMERS_PRE), frozenset(EXPECTED_CHILDREN), APART, APART),
)


def fitting(rollout: Mapping[str, str], trainer: Mapping[str, str]) -> Pairs:
    """The pairs of the layout that both module trees have; the built-in ones, whose errors say what is missing, without one."""
    below = [_below_first(names, prefix) for names, prefix in zip((rollout, trainer), BUILT_IN.layers, strict=True)]
    return next((layout.pairs for layout in LAYOUTS if layout.fits(*below)), BUILT_IN)


def _below_first(names: Mapping[str, str], prefix: str) -> set[str]:
    start = f"{prefix}.0."
    return {name[len(start) :] for name in names if name.startswith(start)}


__all__ = ["LAYOUTS", "Layout", "fitting"]
