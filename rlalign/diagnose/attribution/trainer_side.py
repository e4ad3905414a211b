"""The trainer's model with every matching point visible and replaceable, through forward hooks and the attention registry.

Logprob attribution is what is left of the difference in logprobs once the trainer goes on from the rollout's activation. The cuts
follow the residual stream: after the embedding, after each attention, after each layer, after the last norm, at the logits. A cut
replaces everything before it, so the differences between successive cuts add up to the whole.
Suffixes: B sequences, L padded length, N scored tokens, D features, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from rlalign.diagnose.attribution.mapping import EMBED, FINAL_NORM, LOGITS, ROUTER, ModelMap, Pair
from rlalign.diagnose.both_sides import head_logprobs
from rlalign.head.transform import HeadTransform
from rlalign.rollout.worker.recording import LOGITS as LOGIT_ROWS
from rlalign.rollout.worker.recording import POSITION, SEQUENCE, TOKENS, Recorder, Recording, Tap
from rlalign.trainer.attention import Change, heads_changed
from rlalign.types import RolloutBatch

# Given a point and its value [B, L, D], returns what the model shall go on with, or None for the value itself.
Visitor = Callable[[str, Tensor], Tensor | None]


@contextmanager
def visited(network: nn.Module, pairs: Sequence[Pair], shape: tuple[int, int], visitor: Visitor) -> Iterator[None]:
    """Call `visitor` at every point of every forward inside. shape: (B, L) of the batches.

    Raises ValueError where the model's attention cannot be seen: it then must be run with the sdpa or eager implementation.
    """
    with ExitStack() as stack:
        attention: dict[nn.Module, dict[int, str]] = {}
        for tap in (pair.trainer for pair in pairs):
            module = network.get_submodule(tap.module)
            if tap.side == "attention":
                attention.setdefault(module, {})[tap.index] = tap.point
            else:
                stack.callback(_hook(module, tap, shape, visitor).remove)
        if attention:
            stack.enter_context(heads_changed(network, _heads_visited(attention, shape, visitor)))
        yield


def _hook(module: nn.Module, tap: Tap, shape: tuple[int, int], visitor: Visitor) -> RemovableHandle:
    def before(module: nn.Module, args: tuple, kwargs: dict[str, object]) -> tuple[tuple, dict[str, object]] | None:
        if args:
            changed = _visit(visitor, tap.point, args[tap.index], shape)
            return ((*args[: tap.index], changed, *args[tap.index + 1 :]), kwargs)
        name = list(kwargs)[tap.index]
        return args, kwargs | {name: _visit(visitor, tap.point, kwargs[name], shape)}

    def after(module: nn.Module, args: tuple, output: object) -> object:
        if isinstance(output, Tensor):
            return _visit(visitor, tap.point, output, shape)
        changed = _visit(visitor, tap.point, output[tap.index], shape)
        return type(output)((*output[: tap.index], changed, *output[tap.index + 1 :]))

    if tap.side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def _visit(visitor: Visitor, point: str, value: Tensor, shape: tuple[int, int]) -> Tensor:
    """value: [B, L, D], [B * L, D] or [B, L, heads, D], as the model has it."""
    changed = visitor(point, value.reshape(*shape, -1))
    return value if changed is None else changed.to(value.dtype).reshape(value.shape)


def _heads_visited(points: dict[nn.Module, dict[int, str]], shape: tuple[int, int], visitor: Visitor) -> Change:
    def change(module: nn.Module, heads: list[Tensor]) -> list[Tensor]:
        for index, point in points.get(module, {}).items():
            by_token = heads[index].transpose(1, 2)  # [B, L, heads, D]
            heads[index] = _visit(visitor, point, by_token, shape).transpose(1, 2)
        return heads

    return change


def module_names(network: nn.Module) -> dict[str, str]:
    """{name: class} of the trainer's modules."""
    return {name: type(module).__qualname__ for name, module in network.named_modules()}


LOGIT_ELEMENTS = 2**22  # logits made at once


@dataclass(frozen=True, slots=True)
class Side:
    """One way to run the trainer's model. rows: sequences in one forward, 0 for all; wide: in the next larger arithmetic."""

    network: nn.Module
    mapping: ModelMap
    rows: int = 0
    wide: bool = False


@torch.no_grad()
def record(side: Side, batch: RolloutBatch, directory: Path, *, inputs: Recording | None = None) -> Recording:
    """One pass over the batch. inputs: after each point the model goes on with this recording's value instead of its own.

    With inputs, every recorded value is what one module makes of the rollout's activations: differences do not accumulate.
    """
    recorder = Recorder(directory / "rank0")
    for first in range(0, len(batch), side.rows or len(batch)):
        part = batch.rows(slice(first, first + (side.rows or len(batch))))
        _record_part(side, part, first, recorder, inputs)
    recorder.close()
    return Recording(directory)


def _record_part(side: Side, batch: RolloutBatch, first: int, recorder: Recorder, inputs: Recording | None) -> None:
    mask_BL = batch.attention_mask_BL
    sequence_N, position_N = mask_BL.nonzero(as_tuple=True)
    rows_N3 = torch.stack([sequence_N + first, position_N, torch.zeros_like(position_N)], dim=1)
    recorder.rows(TOKENS, rows_N3)
    replaced = {p.point for p in side.mapping.pairs if inputs is not None and p.replace and p.point in inputs}
    sequences = range(first, first + len(batch))

    def visit(point: str, value_BLD: Tensor) -> Tensor | None:
        recorder.write(point, value_BLD[mask_BL.to(value_BLD.device)])
        return substitute(inputs, point, value_BLD, sequences) if point in replaced else None

    device = next(side.network.parameters()).device
    with (
        visited(side.network, side.mapping.pairs, tuple(mask_BL.shape), visit),
        Widened() if side.wide else nullcontext(),
    ):
        body = side.network.base_model(
            input_ids=batch.token_ids_BL.to(device), attention_mask=mask_BL.to(device), use_cache=False
        )
    hidden_ND = body.last_hidden_state[mask_BL.to(device)]
    step = max(1, LOGIT_ELEMENTS // side.network.config.get_text_config().vocab_size)
    recorder.rows(LOGIT_ROWS, rows_N3)
    for start in range(0, len(hidden_ND), step):
        recorder.write(LOGITS, logits(side, hidden_ND[start : start + step]), table=LOGIT_ROWS)


def logits(side: Side, hidden_ND: Tensor) -> Tensor:
    """[N, V] as the trainer's head makes them, in float32; in wide arithmetic as the exact product."""
    head = side.network.get_output_embeddings()
    transform = HeadTransform.of(side.network.config)
    hidden_ND = transform.hidden(hidden_ND)
    if side.wide:
        return transform.apply(nn.functional.linear(hidden_ND, head.weight, head.bias))
    return transform.apply(head(hidden_ND)).float()


def substitute(inputs: Recording, point: str, value_BLD: Tensor, sequences: range) -> Tensor:
    """The value with every token that the recording knows replaced by what it holds."""
    known_BLD, known_BL = inputs.dense(point, sequences, value_BLD.shape[1], width=value_BLD.shape[2])
    device = value_BLD.device
    return torch.where(known_BL[..., None].to(device), known_BLD.to(device, value_BLD.dtype), value_BLD)


def widened(side: Side) -> Side:
    """The same model in float64 where its body is float32, in float32 where it is narrower: what rounding is measured against.

    It holds a second copy of the weights, twice as large or more.
    """
    body = next(side.network.parameters()).dtype
    wide = torch.float64 if body == torch.float32 else torch.float32
    head = side.network.get_output_embeddings()
    mirrored = head.__dict__.pop("forward", None)  # bound to the narrow head; the wide one projects by itself
    try:
        network = copy.deepcopy(side.network).to(wide)
    finally:
        if mirrored is not None:
            head.forward = mirrored
    if any(pair.kind == ROUTER for pair in side.mapping.pairs):
        network.set_experts_implementation("eager")  # the grouped kernel knows no float64
    return Side(network, side.mapping, side.rows, wide=True)


class Widened(TorchFunctionMode):
    """Inside, what asks for float32 gets float64 when its input is float64: models widen by hand (norms, softmax, rope)."""

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict[str, object] | None = None
    ) -> object:
        kwargs = dict(kwargs or {})
        wide = any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
        if wide and function is Tensor.float:
            return args[0]
        if wide:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return function(*args, **kwargs)


LOGPROBS = "logprobs"


@dataclass(frozen=True, slots=True)
class Cut:
    """A place where the trainer goes on from the rollout's activations. skip: leading layers that need not run."""

    name: str
    points: tuple[str, ...]
    skip: int


@dataclass(frozen=True, slots=True)
class Removed:
    """One cut. remaining: mean |delta logp| with it (nats); share: its part of the whole squared difference; shares sum to 1."""

    cut: str
    remaining: float
    share: float


def cuts(mapping: ModelMap) -> list[Cut]:
    """In the order of computation."""
    found, known = [Cut(EMBED, (EMBED,), 0)], set(mapping.points())
    for layer in range(mapping.layers):
        before = f"layers.{layer - 1}.residual" if layer else EMBED
        if f"layers.{layer}.attn_out" in known:
            found.append(Cut(f"layers.{layer}.attn_out", (before, f"layers.{layer}.attn_out"), layer))
        found.append(Cut(f"layers.{layer}.residual", (f"layers.{layer}.residual",), layer + 1))
    return [*found, Cut(FINAL_NORM, (FINAL_NORM,), mapping.layers)]


@torch.no_grad()
def logprobs(side: Side, batch: RolloutBatch, *, head_dtype: str, temperature: float) -> Tensor:
    """[B, L]: the trainer's own, in the same micro-batches as the patched passes."""
    return _logprobs(side, batch, None, (), 0, head_dtype, temperature)


@torch.no_grad()
def attribute(
    side: Side,
    batch: RolloutBatch,
    rollout: Recording,
    rollout_BL: Tensor,
    own_BL: Tensor,
    *,
    head_dtype: str,
    temperature: float,
) -> list[Removed]:
    """Every cut. rollout_BL, own_BL: logprobs of the two sides (nats).

    The last entry is the logprob itself: what is left when the trainer normalises the rollout's own logits.
    """
    mask_BL = batch.loss_mask_BL
    deltas = {}
    for cut in cuts(side.mapping):
        patched_BL = _logprobs(side, batch, rollout, cut.points, cut.skip, head_dtype, temperature)
        deltas[cut.name] = (patched_BL - rollout_BL)[mask_BL].double()
    deltas[LOGITS] = (from_logits(rollout, batch, temperature, torch.float32) - rollout_BL)[mask_BL].double()
    whole_N = (own_BL - rollout_BL)[mask_BL].double()
    return removed(whole_N, deltas | {LOGPROBS: torch.zeros_like(whole_N)})


def removed(whole_N: Tensor, deltas: dict[str, Tensor]) -> list[Removed]:
    """Shares by projection: of the token-wise step between two cuts, the part along the whole difference. They sum to 1.

    Where the two sides agree in every token there is nothing to share, and every share is 0.
    """
    total, before_N, found = float(whole_N.square().sum()), whole_N, []
    for name, after_N in deltas.items():
        share = float(((before_N - after_N) * whole_N).sum()) / total if total else 0.0
        found.append(Removed(name, float(after_N.abs().mean()), share))
        before_N = after_N
    return found


def _logprobs(
    side: Side,
    batch: RolloutBatch,
    rollout: Recording | None,
    points: Sequence[str],
    skip: int,
    head_dtype: str,
    temperature: float,
) -> Tensor:
    pairs = [side.mapping.pair(point) for point in points]
    rows, device, found = side.rows or len(batch), next(side.network.parameters()).device, []
    for first in range(0, len(batch), rows):
        part = batch.rows(slice(first, first + rows))
        sequences = range(first, first + len(part))

        def visit(point: str, value_BLD: Tensor, sequences: range = sequences) -> Tensor:
            return substitute(rollout, point, value_BLD, sequences)

        with _skipped(side, skip), visited(side.network, pairs, tuple(part.token_ids_BL.shape), visit):
            body = side.network.base_model(
                input_ids=part.token_ids_BL.to(device),
                attention_mask=part.attention_mask_BL.to(device),
                use_cache=False,
            )
        found.append(head_logprobs(side.network, body.last_hidden_state, part, head_dtype, temperature=temperature))
    return torch.cat(found)


@contextmanager
def _skipped(side: Side, count: int) -> Iterator[None]:
    """The first `count` layers hand their input on: what they make would be replaced anyway."""
    modules = [side.network.get_submodule(f"{side.mapping.trainer_layers}.{i}") for i in range(count)]
    for module in modules:
        module.forward = _hand_on_in_a_tuple if side.mapping.tuples else _hand_on
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _hand_on(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    return hidden_states


def _hand_on_in_a_tuple(hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor]:
    return (hidden_states,)


def from_logits(recording: Recording, batch: RolloutBatch, temperature: float, dtype: torch.dtype) -> Tensor:
    """[B, L]: logprobs of the scored tokens by normalising recorded logits in this dtype (nats, 0.0 elsewhere)."""
    table_N3, width = recording.table(LOGITS), recording.width(LOGITS)
    found_BL = torch.zeros(batch.token_ids_BL.shape, dtype=dtype)
    asked_BL = torch.nn.functional.pad(batch.loss_mask_BL[:, 1:], (0, 1))
    rows_N = asked_BL[table_N3[:, SEQUENCE], table_N3[:, POSITION]].nonzero()[:, 0]
    for rows in rows_N.split(max(1, LOGIT_ELEMENTS // width)):
        sequence_N, position_N = table_N3[rows, SEQUENCE], table_N3[rows, POSITION] + 1
        logprobs_NV = (recording.read(LOGITS, rows, width=width).to(dtype) / temperature).log_softmax(-1)
        ids_N = batch.token_ids_BL[sequence_N, position_N]
        found_BL[sequence_N, position_N] = logprobs_NV.gather(1, ids_N[:, None])[:, 0]
    return found_BL
