"""Op by op: which way of rounding gives the engine's bits? The recorded inputs of every op go through every variant.

The engine is teacher-forced once; the input of one op is the output of another, so nothing upstream is counted. What comes out is
one row per op and variant, with the share of elements that differ, and the choice that `mirror_body` takes.
T tokens, D features, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from rlalign.diagnose.attribution.mapping import EMBED, FINAL_NORM, ModelMap
from rlalign.head import steady
from rlalign.rollout.worker.recording import DECODED, POSITION, SEQUENCE, Recording
from rlalign.trainer.rounding import residual_stream, variants
from rlalign.trainer.rounding.mirrored_attention import EngineKernels
from rlalign.trainer.rounding.mirroring import Choices
from rlalign.trainer.rounding.variants import ACTIVATION, ADD_AND_NORM, ATTENTION, MODEL, PRODUCTS, ROPE


@dataclass(frozen=True, slots=True)
class OpDifference:
    """part: the point of the layers it is about. differ: share of elements with other bits than the engine's, all layers together;
    worst: of the worst layer. cost: place among the op's variants."""

    op: str
    part: str
    variant: str
    cost: int
    elements: int
    differ: float
    worst: float

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """Points of one layer, all tokens; decoded_T: those that count, on the decode route those that were decoded."""

    points: Callable[[str], Tensor]
    counted_T: Tensor
    positions_T: Tensor
    lengths: tuple[int, ...]


@torch.no_grad()
def probe(
    network: nn.Module, recording: Recording, mapping: ModelMap, *, decoded: bool, kernels: EngineKernels | None
) -> list[OpDifference]:
    """Every variant of every op against one recording of the engine, made with `mapping.rollout_taps`.

    decoded: only tokens that the engine decoded count. kernels: the engine's own; without them their variant is left out.
    Raises ValueError for a recording that lacks tokens, and for a model whose layers have another shape than Llama's.
    """
    table_T3 = recording.table(EMBED)
    lengths = torch.bincount(table_T3[:, SEQUENCE])
    if not torch.equal(table_T3[:, POSITION], torch.cat([torch.arange(n) for n in lengths.tolist()])):
        raise ValueError("the recording lacks tokens of a sequence: record whole sequences, without a prefix cache")
    rows = torch.arange(len(table_T3))
    counted_T = (table_T3[:, DECODED] == 1) if decoded else torch.ones(len(rows), dtype=torch.bool)
    counts: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
    for layer in range(mapping.layers):

        def point(name: str, at: int = layer) -> Tensor:
            full = name if name in (EMBED, FINAL_NORM) else f"layers.{at}.{name}"
            return recording.read(full, rows, width=recording.width(full))

        given = _Recorded(point, counted_T, table_T3[:, POSITION], tuple(lengths.tolist()))
        for op, part, variant, found, expected in _layer(network, layer, mapping.layers, given, kernels):
            apart = int((found[counted_T] != expected[counted_T]).sum())
            counts.setdefault((op, part, variant), []).append((apart, expected[counted_T].numel()))
    return [_row(key, found) for key, found in counts.items()]


def chosen(rows: list[OpDifference]) -> Choices:
    """Of each op the variant with the fewest differing elements over all its parts; the cheapest where several tie."""
    best: dict[str, str] = {}
    for op in {row.op for row in rows}:
        names = {row.variant: row.cost for row in rows if row.op == op}
        apart = {n: sum(r.differ * r.elements for r in rows if r.op == op and r.variant == n) for n in names}
        best[op] = min(names, key=lambda name: (apart[name], names[name]))
    return Choices(**best)


def _row(key: tuple[str, str, str], found: list[tuple[int, int]]) -> OpDifference:
    op, part, variant = key
    cost = next(v.cost for v in variants.of(op) if v.name == variant)
    total = sum(n for _, n in found)
    return OpDifference(op, part, variant, cost, total, sum(a for a, _ in found) / total, max(a / n for a, n in found))


Compared = tuple[str, str, str, Tensor, Tensor]  # op, part, variant, what it gives, what the engine gave


def _layer(
    network: nn.Module, at: int, layers: int, given: _Recorded, kernels: EngineKernels | None
) -> Iterator[Compared]:
    layer, point = network.base_model.layers[at], given.points
    if {name for name, _ in layer.named_children()} != residual_stream.PRE_NORM or not hasattr(
        layer.self_attn, "q_proj"
    ):
        raise ValueError(f"{type(layer).__name__}: the probe of single ops knows layers of Llama's shape only so far")
    before = point(EMBED) if at == 0 else point("residual", at - 1)
    if at:
        yield from _norms(
            layer.input_layernorm, point("mid_residual", at - 1), point("mlp_out", at - 1), "input_norm", given
        )
    yield from _norms(layer.post_attention_layernorm, before, point("attn_out"), "mlp_norm", given)
    if at == layers - 1:
        yield from _norms(network.base_model.norm, point("mid_residual"), point("mlp_out"), FINAL_NORM, given)
    yield from _products(layer, given)
    yield from _ropes(network, layer.self_attn, given)
    gate, up, act = point("gate"), point("up"), layer.mlp.act_fn
    yield ACTIVATION, "activation", MODEL, variants.activated_model(gate, up, act), point("activation")
    yield ACTIVATION, "activation", variants.ROUNDED_ONCE, variants.activated_once(gate, up, act), point("activation")
    yield from _attentions(layer.self_attn, given, kernels)


def _norms(norm: nn.Module, residual: Tensor, branch: Tensor, part: str, given: _Recorded) -> Iterator[Compared]:
    rounded, wide = variants.added(residual, branch)
    epsilon, expected = residual_stream.epsilon_of(norm), given.points(part)
    for name, of, weight_wide in (
        (MODEL, rounded.float(), False),
        (variants.WEIGHT_WIDE, rounded.float(), True),
        (variants.SUM_ROUNDED_LATE, wide, False),
        (variants.SUM_ROUNDED_LATE_WEIGHT_WIDE, wide, True),
    ):
        yield ADD_AND_NORM, part, name, variants.norm(of, norm.weight, epsilon, weight_wide=weight_wide), expected


def _products(layer: nn.Module, given: _Recorded) -> Iterator[Compared]:
    attention, mlp, point = layer.self_attn, layer.mlp, given.points
    pairs: Mapping[str, tuple[nn.Module, str]] = {
        "q": (attention.q_proj, "input_norm"),
        "k": (attention.k_proj, "input_norm"),
        "v": (attention.v_proj, "input_norm"),
        "attn_out": (attention.o_proj, "attention"),
        "gate": (mlp.gate_proj, "mlp_norm"),
        "up": (mlp.up_proj, "mlp_norm"),
        "mlp_out": (mlp.down_proj, "activation"),
    }
    one_order = not steady.missing(attention.q_proj.weight.dtype)
    for part, (linear, source) in pairs.items():
        x, expected = point(source), point(part)
        yield PRODUCTS, part, MODEL, nn.functional.linear(x, linear.weight, linear.bias), expected
        if one_order:
            yield PRODUCTS, part, variants.ONE_ORDER, steady.linear(x, linear.weight, linear.bias), expected


def _ropes(network: nn.Module, attention: nn.Module, given: _Recorded) -> Iterator[Compared]:
    positions, size = given.positions_T[None], attention.head_dim
    for part, source, norm in (("q_rope", "q", "q_norm"), ("k_rope", "k", "k_norm")):
        states = given.points(norm if hasattr(attention, norm) else source).view(len(positions[0]), -1, size)
        expected, by_head = given.points(part), states.transpose(0, 1)
        narrow, wide = (
            [x[0] for x in network.base_model.rotary_emb(like, positions)] for like in (by_head, by_head.float())
        )
        for name, function, turn in (
            (MODEL, variants.rotated_model, narrow),
            (variants.ROUNDED_ONCE, variants.rotated, narrow),
            (variants.ROUNDED_ONCE_WIDE_COS, variants.rotated, wide),
        ):
            yield ROPE, part, name, function(by_head, *turn).transpose(0, 1).flatten(1), expected


def _attentions(attention: nn.Module, given: _Recorded, kernels: EngineKernels | None) -> Iterator[Compared]:
    size, scale = attention.head_dim, attention.scaling
    query, key, value = (given.points(p).unflatten(1, (-1, size)) for p in ("q_rope", "k_rope", "v"))
    expected, parts = given.points("attention"), []
    for q, k, v in zip(*(x.split(given.lengths) for x in (query, key, value)), strict=True):
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        found = nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(found[0].transpose(0, 1).flatten(1))
    yield ATTENTION, "attention", MODEL, torch.cat(parts), expected
    if kernels is not None:
        found = kernels.attend(query, key, value, given.lengths, scale=scale, window=None, soft_cap=0.0).flatten(1)
        yield ATTENTION, "attention", variants.ENGINE_KERNEL, found, expected
