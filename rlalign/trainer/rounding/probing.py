"""Op by op: which way of rounding gives the engine's bits? Recorded inputs of its ops go through every variant.

The input of one op is what the engine gave it, so nothing upstream is counted. A trainer's module is found by the engine's name.
T tokens, D features, E head size.
"""

from __future__ import annotations

import inspect
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlalign.head import steady
from rlalign.trainer.fake_quantised import FUSED
from rlalign.trainer.rounding import mirrored_modules, variants
from rlalign.trainer.rounding.mirrored_modules import EngineKernels
from rlalign.trainer.rounding.mirroring import Choices
from rlalign.trainer.rounding.variants import ACTIVATION, ADD_AND_NORM, ATTENTION, MODEL, PRODUCTS, RESIDUAL, ROPE

Values = Mapping[str, Tensor]  # {in0, in1, ..., out0, ...} of one module
Way = tuple[str, Callable[[], Tensor]]  # a variant's name, and what it gives
Compared = tuple[str, list[Way], Tensor]  # an op, its ways, what the engine gave


@dataclass(frozen=True, slots=True)
class OpDifference:
    """part: the engine's module below its layer, kind: its class. prefill, decode: share of elements with other bits than the
    engine's, all recorded layers together; None where no token was of that kind. cost: place among the op's variants; ms: of one
    thread, for the recorded tokens."""

    op: str
    part: str
    kind: str
    variant: str
    cost: int
    ms: float
    elements: int
    prefill: float | None
    decode: float | None
    apart: int

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Probed:
    """rows: one per op, part and variant. left: {part: why nothing is known of it}. tokens: how many were recorded."""

    rows: tuple[OpDifference, ...]
    left: Mapping[str, str]
    tokens: int

    @property
    def choices(self) -> Choices:
        """Of each op the variant with the fewest differing elements over all its parts; the cheapest where several tie.

        Of ops that add up (`variants.SUMS`) the costliest, which adds in the engine's order: some hundred rows without a
        difference say nothing of other rows.
        """
        return Choices(**{op: self._best(op) for op in {row.op for row in self.rows}})

    def _best(self, op: str) -> str:
        rows, costs = [r for r in self.rows if r.op == op], {}
        for row in rows:
            costs[row.variant] = row.cost
        return min(costs, key=lambda name: (self.apart(op, name), -costs[name] if op in variants.SUMS else costs[name]))

    def apart(self, op: str, variant: str) -> int:
        """Elements of an op with other bits than the engine's; a part that has no such variant computes as the model does."""
        parts: dict[tuple[str, str], dict[str, int]] = {}
        for row in self.rows:
            if row.op == op:
                parts.setdefault((row.part, row.kind), {})[row.variant] = row.apart
        return sum(found.get(variant, found.get(MODEL, 0)) for found in parts.values())

    def shares(self, choices: Choices | None = None) -> list[dict[str, object]]:
        """Each part of each op: the variant chosen, and the share of elements with other bits than the engine's before and after.

        before: rounded as the model does; time: of the variant, as a multiple of the model's, from one call of each.
        """
        choices, found = self.choices if choices is None else choices, []
        for op in variants.OPS:
            for part, kind in dict.fromkeys((r.part, r.kind) for r in self.rows if r.op == op):
                own = {r.variant: r for r in self.rows if (r.op, r.part, r.kind) == (op, part, kind)}
                before, after = own[MODEL], own.get(getattr(choices, op), own[MODEL])
                shares = before.prefill, after.prefill, before.decode, after.decode
                names = "prefill before", "prefill after", "decode before", "decode after"
                what = {"op": op, "part": f"{part} ({kind})", "variant": after.variant}
                found.append(what | dict(zip(names, shares, strict=True)) | {"time": after.ms / max(before.ms, 1e-3)})
        return found

    def table(self, choices: Choices | None = None) -> list[str]:
        """Markdown lines of `shares`, and what is not probed."""
        rows = self.shares(choices)
        texts = [[_cell(name, value) for name, value in row.items()] for row in rows]
        head = [list(rows[0]), ["---"] * 3 + ["--:"] * 5] if rows else []
        lines = [f"| {' | '.join(cells)} |" for cells in [*head, *texts]]
        return [*lines, *(f"not probed: {part}: {why}" for part, why in self.left.items())]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        rows = [row.as_dict() for row in self.rows]
        return {"choices": asdict(self.choices), "tokens": self.tokens, "rows": rows, "left": dict(self.left)}


def _cell(name: str, value: object) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, str) else f"{value:.1f}" if name == "time" else f"{value:.3%}"


def _share(apart: float, of: float) -> float | None:
    return apart / of if of else None


@torch.no_grad()
def probe(
    network: nn.Module, file: Path, modules: Mapping[str, Mapping[str, object]], *, kernels: EngineKernels | None
) -> Probed:
    """Every variant of every recorded op. file, modules: of the engine's recording (`rlalign_ops_stop`).

    network: the trainer's model, not mirrored, with the engine's weights. kernels: the engine's own; without them their variant
    is left out. Raises ValueError for a recording without a whole sequence.
    """
    tensors = load_file(file)
    rows_T3 = tensors.pop("rows")
    order_T, lengths = _whole_sequences(rows_T3)
    positions_T, decoded_T = rows_T3[order_T, 1], rows_T3[order_T, 2] == 1
    tensors = {name: tensor[order_T] for name, tensor in tensors.items()}
    found, left = _Counts(decoded_T), {}
    for name, about in modules.items():
        values = {place: tensors[f"{name}|{place}"] for place in about["places"]}
        part = re.sub(r".*layers\.\d+\.", "", name)
        try:
            op, ways, expected = _compared(network, name, about, values, _Tokens(positions_T, lengths), kernels)
        except _Unknown as why:
            left[part] = str(why)
            continue
        found.add(op, part, str(about["class"]), ways, expected)
    layers = {name: module for name, module in network.named_modules() if re.search(r"layers\.\d+$", name)}
    for name in layers:
        if ways := _sums(layers, name, tensors):
            found.add(RESIDUAL, "sum", type(network).__name__, *ways)
    return Probed(found.rows(), left, len(order_T))


@dataclass
class _Counts:
    """Differing elements by (op, part, kind, variant): prefilled, decoded, all elements, prefilled elements, ms."""

    decoded_T: Tensor
    counts: dict[tuple[str, str, str, str], list[float]] = field(default_factory=dict)

    def add(self, op: str, part: str, kind: str, ways: list[Way], expected: Tensor) -> None:
        """Compute each way and count."""
        decoded_T = self.decoded_T
        for variant, compute in ways:
            apart_T = (compute().view_as(expected) != expected).flatten(1).sum(1)
            began = time.perf_counter()  # of a second call: the first proves the library's products for these shapes
            compute()
            ms = 1e3 * (time.perf_counter() - began)
            one = (
                apart_T[~decoded_T].sum(),
                apart_T[decoded_T].sum(),
                expected.numel(),
                expected[~decoded_T].numel(),
                ms,
            )
            known = self.counts.setdefault((op, part, kind, variant), [0.0] * 5)
            self.counts[op, part, kind, variant] = [a + float(b) for a, b in zip(known, one, strict=True)]

    def rows(self) -> tuple[OpDifference, ...]:
        """One per key."""
        return tuple(self._row(*key, *found) for key, found in self.counts.items())

    def _row(
        self, op: str, part: str, kind: str, variant: str,
        prefilled: float, decoded: float, total: float, of_prefill: float, ms: float,
    ) -> OpDifference:  # fmt: skip
        cost = next(v.cost for v in variants.of(op) if v.name == variant)
        shares = _share(prefilled, of_prefill), _share(decoded, total - of_prefill)
        return OpDifference(op, part, kind, variant, cost, ms, int(total), *shares, int(prefilled + decoded))


class _Unknown(Exception):
    """Why an op of the engine has no counterpart here."""


@dataclass(frozen=True, slots=True)
class _Tokens:
    positions_T: Tensor
    lengths: Sequence[int]


def _whole_sequences(rows_T3: Tensor) -> tuple[Tensor, list[int]]:
    """Indices of the tokens of requests that were seen from their first token on, sequence by sequence, and their lengths."""
    order: list[Tensor] = []
    for request in rows_T3[:, 0].unique().tolist():
        own = (rows_T3[:, 0] == request).nonzero()[:, 0]
        own = own[rows_T3[own, 1].argsort(stable=True)]
        if torch.equal(rows_T3[own, 1], torch.arange(len(own))):
            order.append(own)
    if not order:
        raise ValueError(
            "the engine's recording holds no sequence from its first token on: record without a warm prefix cache"
        )
    return torch.cat(order), [len(own) for own in order]


def _compared(
    network: nn.Module,
    name: str,
    about: Mapping[str, object],
    values: Values,
    tokens: _Tokens,
    kernels: EngineKernels | None,
) -> Compared:
    if about["quantised"]:
        raise _Unknown("quantised: mirrored around it")
    given = [values[p] for p in sorted(values) if p.startswith("in") and values[p].is_floating_point()]
    kind = about["kind"]
    if kind == "norm":
        return ADD_AND_NORM, _norms(_module(network, name), given), values["out0"]
    if kind == "linear":
        return PRODUCTS, _products(network, name, given[0], kernels), values["out0"]
    parent = _module(network, name.rpartition(".")[0])
    if kind == "activation":
        return ACTIVATION, _activations(parent, given[0]), values["out0"]
    size = int(about["head_size"])
    if kind == "rope":
        return ROPE, _ropes(network, parent, given, size, tokens), torch.cat((values["out0"], values["out1"]), dim=-1)
    return (
        ATTENTION,
        _attentions(parent, [x.flatten(1).unflatten(1, (-1, size)) for x in given[:3]], tokens, kernels),
        values["out0"],
    )


def _module(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        raise _Unknown(f"{type(network).__name__} has no module {name}") from None


def _norms(norm: nn.Module, given: list[Tensor]) -> list[Way]:
    """given: a state, and the residual where the engine adds it."""
    rounded, wide = variants.added(given[1], given[0]) if len(given) > 1 else (given[0], given[0].float())
    ways: list[Way] = [(MODEL, lambda: type(norm).forward(norm, rounded))]
    if not mirrored_modules.is_rms(norm):
        return ways
    epsilon, offset = mirrored_modules.epsilon_of(norm), mirrored_modules.has_offset(norm)
    return [*ways, *variants.norms(rounded, wide, norm.weight, epsilon, offset=offset).items()]


def _products(network: nn.Module, name: str, x: Tensor, kernels: EngineKernels | None) -> list[Way]:
    above, _, leaf = name.rpartition(".")
    try:
        parts = [_module(network, name)]
    except _Unknown:
        parts = [_module(network, f"{above}.{part}") for part in FUSED.get(leaf, (leaf,))]
    if any(getattr(part, "weight", x.new_empty(0)).ndim != 2 for part in parts):
        raise _Unknown(f"{type(parts[0]).__name__} is no product with one weight")
    weights = [(part.weight, getattr(part, "bias", None)) for part in parts]
    ways: list[Way] = [(MODEL, lambda: torch.cat([nn.functional.linear(x, w, b) for w, b in weights], dim=-1))]
    if all(type(part) is nn.Linear for part in parts) and not steady.missing(weights[0][0].dtype):
        rest = None if kernels is None else kernels.multiply
        ways.append(
            (variants.ONE_ORDER, lambda: torch.cat([steady.linear(x, w, b, rest=rest) for w, b in weights], dim=-1))
        )
    return ways


def _activations(mlp: nn.Module, gate_up: Tensor) -> list[Way]:
    act = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    if act is None:
        raise _Unknown(f"{type(mlp).__name__} has no act_fn")
    gate, up = gate_up.chunk(2, dim=-1)
    functions = ((MODEL, variants.activated_model), (variants.ROUNDED_ONCE, variants.activated_once))
    return [(name, lambda function=function: function(gate, up, act)) for name, function in functions]


def _ropes(network: nn.Module, attention: nn.Module, given: list[Tensor], size: int, tokens: _Tokens) -> list[Way]:
    """Queries and keys side by side, turned by transformers' own formula in the model's dtype or in float32."""
    turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    rotary = getattr(network.base_model, "rotary_emb", None)
    if turn is None or rotary is None:
        raise _Unknown(f"{type(attention).__name__} turns positions in its own way")
    kinds = getattr(network.config, "layer_types", None)
    typed = "layer_type" in inspect.signature(rotary.forward).parameters
    extra = {"layer_type": kinds[attention.layer_idx]} if typed else {}
    heads = [x.flatten(1).unflatten(1, (-1, size)).transpose(0, 1)[None] for x in given[:2]]

    def turned(
        states: list[Tensor], like: Tensor, dtype: torch.dtype, narrowed: Callable[[Tensor], Tensor] = Tensor.bfloat16
    ) -> Tensor:
        cos, sin = (x.to(dtype) for x in rotary(like, tokens.positions_T[None], **extra))
        found = turn(*(x.to(dtype) for x in states), cos, sin)
        return torch.cat([narrowed(x[0].transpose(0, 1).flatten(1)) for x in found], dim=-1)

    narrow, wide = given[0].dtype, torch.float32
    return [
        (MODEL, lambda: turned(heads, heads[0], narrow)),
        (variants.ROUNDED_ONCE, lambda: turned(heads, heads[0], wide)),
        (variants.ROUNDED_ONCE_WIDE_COS, lambda: turned(heads, heads[0].float(), wide)),
        (variants.TRUNCATED_ONCE, lambda: turned(heads, heads[0], wide, variants.truncated)),
    ]


def _attentions(
    attention: nn.Module, states: list[Tensor], tokens: _Tokens, kernels: EngineKernels | None
) -> list[Way]:
    window, cap = mirrored_modules.window_of(attention), getattr(attention, "attn_logit_softcapping", None)
    arguments = {"scale": attention.scaling, "window": window, "soft_cap": cap or 0.0}
    ways: list[Way] = [(MODEL, lambda: torch.cat([*_by_sdpa(states, tokens.lengths, attention.scaling, window)]))]
    if kernels is not None:
        ways.append((variants.ENGINE_KERNEL, lambda: kernels.attend(*states, tokens.lengths, **arguments).flatten(1)))
    return ways


def _by_sdpa(states: list[Tensor], lengths: Sequence[int], scale: float, window: int | None) -> Iterator[Tensor]:
    """torch's attention, sequence by sequence: as transformers computes all but models with a soft cap."""
    for q, k, v in zip(*(x.split(lengths) for x in states), strict=True):
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        ones = torch.ones(len(q), len(q), dtype=torch.bool)
        mask = {"attn_mask": ones.tril() & ~ones.tril(-window)} if window and window < len(q) else {"is_causal": True}
        found = nn.functional.scaled_dot_product_attention(*heads, scale=scale, enable_gqa=True, **mask)
        yield found[0].transpose(0, 1).flatten(1)


def _sums(layers: Mapping[str, nn.Module], name: str, tensors: Values) -> tuple[list[Way], Tensor] | None:
    """Of a parallel layer between two recorded ones: how its branches are added to the stream. None for any other layer."""
    above, _, at = name.rpartition(".")
    before, after = f"{name}.input_layernorm|in0", f"{above}.{int(at) + 1}.input_layernorm|in0"
    if not mirrored_modules.is_parallel(layers[name]) or not {before, after} <= tensors.keys():
        return None
    stream = tensors[before]
    attended, fed = tensors[f"{name}.self_attn.o_proj|out0"], tensors[f"{name}.mlp.down_proj|out0"]
    ways: list[Way] = [
        (MODEL, lambda: stream + attended + fed),
        (variants.BRANCHES_FIRST, lambda: stream + (attended + fed)),
    ]
    return ways, tensors[after]
