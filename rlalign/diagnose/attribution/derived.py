"""Matching points of two models of any architecture, found out instead of listed.

The engine's own loader says in which of its modules, and in which piece of a fused one, a weight of the trainer ends; one forward
on either side says in which order modules run and what goes in and out. A module that holds a weight gives a point at its
output, and one at its input where that is no other module's output (a sum, an activation, what attention returned). Where an
engine may carry a value in two places (a residual stream apart from what is added to it), the one nearer to the trainer's is taken.
State-space and other mixers whose inner steps the two libraries do not share are seen at the points that both have.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rlalign.diagnose.attribution import trainer_side
from rlalign.diagnose.attribution.findings import common_rows, differences
from rlalign.diagnose.attribution.mapping import EMBED, FINAL_NORM, RESIDUAL, ROUTER, ModelMap, Pair, Pairs, match
from rlalign.diagnose.attribution.trainer_side import Side
from rlalign.diagnose.both_sides import ask_about_weights
from rlalign.rollout.engine import teacher_forcing
from rlalign.rollout.engine.embedded import VLLMEngine
from rlalign.rollout.engine.teacher_forcing import Route
from rlalign.rollout.worker.recording import Tap
from rlalign.trainer.attention import heads_changed
from rlalign.trainer.checkpoint_names import as_checkpoint
from rlalign.types import RolloutBatch

PROBE = 64  # tokens of the forward that is looked at
KINDS = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "q_norm": "q_norm", "k_norm": "k_norm", "gate_proj": "gate", "up_proj": "up",
    "router": ROUTER, "gate": ROUTER,
}  # fmt: skip
NUMBERED = re.compile(r"(.*?)\.(\d+)\.(.+)")


@dataclass
class Ran:
    """One of the trainer's modules in the forward that was looked at. Times count hooks; values are (place, tensor)."""

    began: int
    inputs: list[tuple[int, Tensor]]
    ended: int = -1
    outputs: list[tuple[int, Tensor]] = field(default_factory=list)
    several: bool = False  # a tuple came out


@dataclass
class Seen:
    """The trainer's forward: modules by name, and when each was inside its attention function."""

    ran: dict[str, Ran] = field(default_factory=dict)
    attended: dict[str, int] = field(default_factory=dict)
    clock: int = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock


def mapping_of(
    engine: VLLMEngine, network: nn.Module, batch: RolloutBatch, pairs: Pairs | None, scratch: Path | None
) -> ModelMap:
    """The user's pairs, or the built-in ones where a layer consists of what they expect and gives it, or what `derive` finds."""
    names = teacher_forcing.modules(engine), trainer_side.module_names(network)
    if pairs is not None:
        return match(*names, pairs)
    small = _probe(batch)
    outline = _outline(engine, small)
    try:
        return _given(match(*names), outline)
    except ValueError:
        with tempfile.TemporaryDirectory(prefix="rlalign-derived-", dir=scratch) as folder:
            return derive(engine, network, small, outline, Path(folder))


def _given(mapping: ModelMap, outline: Mapping[str, dict]) -> ModelMap:
    """The mapping. Raises ValueError where the engine's module has nothing at a tap's place: Granite's layers return one tensor."""
    for tap in mapping.rollout_taps:
        about = outline.get(tap.module)
        places = None if about is None else about["inputs" if tap.side == "input" else "outputs"]
        if places is not None and tap.side != "attention" and tap.index not in [place for place, _ in places]:
            raise ValueError(f"{tap.module} has no {tap.side} {tap.index} for {tap.point}")
    return mapping


def derive(
    engine: VLLMEngine, network: nn.Module, small: RolloutBatch, outline: Mapping[str, dict], folder: Path
) -> ModelMap:
    """The points of a live engine and a trainer's model. outline: the engine's modules in a forward of `small`, one sequence.

    folder: for one copy of the weights, which every rollout rank can read. Raises ValueError where the two do not have the same
    layers, or share no point in one.
    """
    seen, places = _traced(network, small), _places(engine, network, folder)
    derivation = _Derivation(network, seen, outline, places, engine.config.tensor_parallel_size)
    found = _nearest(derivation.points(), engine, network, small, folder)
    return replace(found, tuples=derivation.tuples)


def _probe(batch: RolloutBatch) -> RolloutBatch:
    return batch.rows(slice(0, 1), min(PROBE, int(batch.attention_mask_BL[0].sum())))


def _outline(engine: VLLMEngine, batch: RolloutBatch) -> dict[str, dict]:
    from vllm import SamplingParams

    engine.reset_prefix_cache()
    engine.ask("rlalign_outline_start")
    try:
        engine.request(
            [batch.token_ids_BL[0].tolist()], [SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)]
        )
    finally:
        found = engine.ask("rlalign_outline_stop")[0]["modules"]
    return found


def _places(engine: VLLMEngine, network: nn.Module, folder: Path) -> dict[str, tuple[str, int | None]]:
    """{trainer's module: (engine's module, part)} of the modules whose weight is one of a checkpoint's tensors."""
    places = ask_about_weights(engine, network, "rlalign_places", folder)[0]["places"]
    found = {}
    for name, parameter in network.named_parameters():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and parameter.ndim <= 2:
            travels = list(as_checkpoint(network, [(name, parameter)]))
            if len(travels) == 1 and travels[0][0] in places:
                found[module] = tuple(places[travels[0][0]])
    return found


@torch.no_grad()
def _traced(network: nn.Module, batch: RolloutBatch) -> Seen:
    seen, length = Seen(), batch.token_ids_BL.shape[1]
    with ExitStack() as stack:
        for name, module in network.base_model.named_modules(prefix=_body_prefix(network)):
            stack.callback(module.register_forward_pre_hook(_enters(seen, name, length), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(_leaves(seen, name, length)).remove)
        names = {module: name for name, module in network.named_modules()}

        def attends(module: nn.Module, heads: list[Tensor]) -> list[Tensor]:
            seen.attended.setdefault(names[module], seen.tick())
            return heads

        stack.enter_context(heads_changed(network, attends))
        device = next(network.parameters()).device
        network.base_model(input_ids=batch.token_ids_BL.to(device), use_cache=False)
    return seen


def _body_prefix(network: nn.Module) -> str:
    return next((n for n, m in network.named_modules() if m is network.base_model), "")


def _enters(seen: Seen, name: str, length: int) -> Callable[[nn.Module, tuple, dict], None]:
    def enter(module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        if name not in seen.ran:
            seen.ran[name] = Ran(seen.tick(), _by_token((*args, *kwargs.values()), length))

    return enter


def _leaves(seen: Seen, name: str, length: int) -> Callable[[nn.Module, tuple, object], None]:
    def leave(module: nn.Module, args: tuple, output: object) -> None:
        ran = seen.ran[name]
        if ran.ended < 0:
            ran.several = isinstance(output, tuple | list)
            ran.ended, ran.outputs = seen.tick(), _by_token(output if ran.several else (output,), length)

    return leave


def _by_token(values: Sequence[object], length: int) -> list[tuple[int, Tensor]]:
    """[1, L, ...] and [L, D]: heads before tokens, masks and tables are left out."""
    floats = [(i, v) for i, v in enumerate(values) if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 1]
    return [(i, v) for i, v in floats if v.shape[:2] == (1, length) or (v.ndim == 2 and len(v) == length)]


@dataclass
class _Derivation:
    """Candidates for every point: [(point, kind, layer, replace), [(rollout tap, trainer tap)...]], in the order of computation."""

    network: nn.Module
    seen: Seen
    outline: Mapping[str, dict]
    places: Mapping[str, tuple[str, int | None]]
    ranks: int

    def points(self) -> list[list[Pair]]:
        """Each entry: what one point may be, the likeliest first."""
        layers = self._layers()
        found = [self._stream(EMBED, EMBED, None, layers[0], before=True)]
        for number, (on_rollout, on_trainer) in enumerate(layers):
            inside = self._inside(number, on_rollout, on_trainer)
            if not inside:
                raise ValueError(
                    f"attribution finds no step that both sides share in {on_trainer} and {on_rollout}; pass --mapping FILE.yaml"
                )
            found += inside
            after = layers[number + 1][0] if number + 1 < len(layers) else None
            found.append(self._stream(f"layers.{number}.{RESIDUAL}", RESIDUAL, number, layers[number], after=after))
        found.append(self._final_norm(layers))
        return found

    @property
    def tuples(self) -> bool:
        """Whether the trainer's layers answer with tuples."""
        return self.seen.ran[self._layers()[0][1]].several

    def _layers(self) -> list[tuple[str, str]]:
        """(rollout, trainer) of each layer."""
        count = self.network.config.get_text_config().num_hidden_layers
        found: dict[int, tuple[str, str]] = {}
        prefixes: set[str] = set()
        for trainer, (rollout, _) in self.places.items():
            here, there = NUMBERED.fullmatch(trainer), NUMBERED.fullmatch(rollout)
            if here and there and here[2] == there[2]:
                prefixes.add(here[1])
                found[int(here[2])] = (f"{there[1]}.{there[2]}", f"{here[1]}.{here[2]}")
        if sorted(found) != list(range(count)) or len(prefixes) != 1:
            raise ValueError(
                f"attribution cannot tell the layers of {type(self.network).__name__}: its configuration has {count}, weights of "
                f"both sides lie in {sorted(found)} of {sorted(prefixes)}; pass --mapping FILE.yaml"
            )
        return [found[i] for i in range(count)]

    def _inside(self, number: int, on_rollout: str, on_trainer: str) -> list[list[Pair]]:
        """Modules with a weight, and what they are part of (a mixture's block), by the time at which they end."""
        leaves = {t: e for t, e in self.places.items() if t.startswith(f"{on_trainer}.") and t in self.seen.ran}
        known = {_key(value) for t in leaves for _, value in self.seen.ran[t].outputs}
        known |= {_key(value) for _, value in self.seen.ran[on_trainer].inputs[:1]}  # the point before this layer
        fresh = {t for t in leaves if self.seen.ran[t].inputs and _key(self.seen.ran[t].inputs[0][1]) not in known}
        blocks = {t: (e, None) for t, e in self._blocks(leaves, on_rollout, on_trainer) if not self._is_known(t, known)}
        names = self._names(leaves, blocks, fresh, on_trainer)
        timed: list[tuple[int, list[Pair]]] = []
        for module, place in (leaves | blocks).items():
            kind = names.get(module) or module.removeprefix(f"{on_trainer}.").replace(".", ":")
            ran = self.seen.ran[module]
            timed.append((ran.ended, self._outputs(f"layers.{number}.{kind}", kind, number, module, place)))
            if module in fresh and _key(ran.inputs[0][1]) not in known:
                known.add(_key(ran.inputs[0][1]))  # q, k and v share theirs
                before = names.get(f"{module} input") or f"{kind}:input"
                timed.append((ran.began, self._inputs(before, number, module, place[0], ran.inputs[0])))
        timed += self._attention(number, on_rollout, on_trainer)
        return [pairs for _, pairs in sorted(timed, key=lambda t: t[0]) if pairs]

    def _is_known(self, module: str, known: set[tuple[int, int]]) -> bool:
        outputs = self.seen.ran[module].outputs
        return not outputs or _key(outputs[0][1]) in known

    def _blocks(self, leaves: Mapping[str, tuple[str, int | None]], on_rollout: str, on_trainer: str) -> list:
        """(trainer's module, engine's module) around paired ones, both with the same way to a module inside."""
        found = {}
        for trainer, (rollout, _) in leaves.items():
            here = trainer.removeprefix(f"{on_trainer}.").split(".")[:-1]
            there = rollout.removeprefix(f"{on_rollout}.").split(".")[:-1]
            if here and len(here) == len(there):
                one, other = f"{on_trainer}.{'.'.join(here)}", f"{on_rollout}.{'.'.join(there)}"
                if one in self.seen.ran and self.outline.get(other, {}).get("outputs"):
                    found[one] = other
        return list(found.items())

    def _names(self, leaves: Mapping[str, tuple], blocks: Mapping, fresh: set[str], on_trainer: str) -> dict[str, str]:
        """Kinds that attribution has words for, told by what a module is there for; "MODULE input" for its input."""
        last = {t: t.rpartition(".")[2] for t in leaves}
        names = {t: KINDS[leaf] for t, leaf in last.items() if leaf in KINDS}
        stream = {_key(value) for _, value in self.seen.ran[on_trainer].inputs[:1]}
        for t in leaves:  # norms of the stream; those of what is added to it keep their names
            ran = self.seen.ran[t]
            if self._dimensions(t) == 1 and t.count(".") == on_trainer.count(".") + 1:
                if t in fresh:
                    names |= {t: "mlp_norm", f"{t} input": "mid_residual"}
                elif _key(ran.inputs[0][1]) in stream:
                    names[t] = "input_norm"
        linear = sorted((t for t in leaves if self._dimensions(t) == 2), key=lambda t: self.seen.ran[t].began)
        attended = [time for name, time in self.seen.attended.items() if name.startswith(f"{on_trainer}.")]
        behind = [t for t in linear if attended and self.seen.ran[t].began > attended[0]]
        if behind:
            names |= {behind[0]: "attn_out", f"{behind[0]} input": "attention"}
            if others := sorted({*behind[1:], *blocks}, key=lambda t: self.seen.ran[t].ended):
                names |= {others[-1]: "mlp_out"} | (
                    {f"{others[-1]} input": "activation"} if others[-1] in leaves else {}
                )
        chosen = list(names.values())
        return {t: kind for t, kind in names.items() if chosen.count(kind) == 1}

    def _dimensions(self, module: str) -> int:
        return self.network.get_submodule(module).weight.ndim

    def _attention(self, number: int, on_rollout: str, on_trainer: str) -> list[tuple[int, list[Pair]]]:
        """Queries and keys as attention gets them, where positions rotate them: other models scale them on one side first."""
        ours = [(n, t) for n, t in self.seen.attended.items() if n.startswith(f"{on_trainer}.")]
        theirs = [n for n, m in self.outline.items() if n.startswith(f"{on_rollout}.") and m["class"] == "Attention"]
        config = self.network.config.get_text_config()
        if len(ours) != 1 or len(theirs) != 1 or not getattr(config, "rope_parameters", None):
            return []
        (module, time), found = ours[0], []
        for i, kind in enumerate(("q_rope", "k_rope")):
            point = f"layers.{number}.{kind}"
            tap = Tap(point, theirs[0], "input", i)
            if [w for place, w in self.outline[theirs[0]]["inputs"] if place == i]:
                found.append((time, [Pair(point, kind, number, tap, Tap(point, module, "attention", i))]))
        return found

    def _outputs(
        self, point: str, kind: str, layer: int | None, module: str, place: tuple[str, int | None]
    ) -> list[Pair]:
        rollout, part = place
        theirs = self.outline.get(rollout, {}).get("outputs") or []
        ours = [(i, _width(v)) for i, v in self.seen.ran[module].outputs]
        if part is not None:
            taps = [(0, part, i) for i, _ in ours[:1] if theirs]
        else:
            taps = [(j, None, i) for i, width in ours for j, other in theirs if self._may_be(width, other)]
        return [
            Pair(
                point, kind, layer, Tap(point, rollout, "output", j, p), Tap(point, module, "output", i), kind != ROUTER
            )
            for j, p, i in taps
        ]

    def _inputs(self, kind: str, layer: int, module: str, rollout: str, ours: tuple[int, Tensor]) -> list[Pair]:
        point = f"layers.{layer}.{kind}"
        trainer = Tap(point, module, "input", ours[0])
        return [Pair(point, kind, layer, tap, trainer) for tap in self._carried(point, rollout, _width(ours[1]))]

    def _carried(self, point: str, rollout: str, width: int) -> list[Tap]:
        """What goes into one of the engine's modules: its inputs, and the sum that a norm with a residual hands on."""
        about = self.outline.get(rollout, {})
        taps = [
            Tap(point, rollout, "output", j) for j, w in (about.get("outputs") or []) if j and self._may_be(width, w)
        ]
        return taps + [Tap(point, rollout, "input", j) for j, w in about.get("inputs") or [] if self._may_be(width, w)]

    def _may_be(self, width: int, piece: int) -> bool:
        return piece == width or (self.ranks > 1 and width % piece == 0 and width // piece <= self.ranks)

    def _stream(
        self,
        point: str,
        kind: str,
        layer: int | None,
        here: tuple[str, str],
        *,
        before: bool = False,
        after: str | None = None,
    ) -> list[Pair]:
        """The residual stream before the first layer, or behind a layer; after: the engine's next layer."""
        rollout, trainer = here
        ran = self.seen.ran[trainer]
        if before:
            i, value = ran.inputs[0]
            taps = [t for t in self._carried(point, rollout, _width(value)) if t.side == "input"]
            return [Pair(point, kind, layer, tap, Tap(point, trainer, "input", i)) for tap in taps]
        i, value = ran.outputs[0]
        width = _width(value)
        taps = [Tap(point, rollout, "output", j) for j, w in self.outline[rollout]["outputs"] if self._may_be(width, w)]
        following = self._first_norm(after) if after else self._final_names()[0]
        if following:
            taps += [t for t in self._carried(point, following, width) if t.side == "output"]
        return [Pair(point, kind, layer, tap, Tap(point, trainer, "output", i)) for tap in taps]

    def _first_norm(self, layer: str) -> str | None:
        """The first of a layer's modules that hands on more than one value."""
        inside = (n for n, m in self.outline.items() if n.startswith(f"{layer}.") and len(m["outputs"] or []) > 1)
        return next(inside, None)

    def _final_names(self) -> tuple[str, str]:
        """The last module with a weight, behind all layers: (rollout, trainer); empty without one."""
        outside = [t for t in self.places if t in self.seen.ran and not NUMBERED.fullmatch(t)]
        last = max(outside, key=lambda t: self.seen.ran[t].ended, default="")
        return (self.places[last][0], last) if last else ("", "")

    def _final_norm(self, layers: Sequence[tuple[str, str]]) -> list[Pair]:
        rollout, trainer = self._final_names()
        if not trainer or self.seen.ran[trainer].began < self.seen.ran[layers[-1][1]].ended:
            raise ValueError(f"attribution finds no norm behind the layers of {type(self.network).__name__}")
        return self._outputs(FINAL_NORM, FINAL_NORM, None, trainer, (rollout, None))


def _width(value: Tensor) -> int:
    """Features of one token."""
    return value[0].numel() // (value.shape[1] if value.ndim > 2 else 1)


def _key(value: Tensor) -> tuple[int, int]:
    return value.data_ptr(), value.numel()


def _nearest(
    points: list[list[Pair]], engine: VLLMEngine, network: nn.Module, batch: RolloutBatch, folder: Path
) -> ModelMap:
    """One pair a point. Both sides are run once more where a point may be several."""
    layers = 1 + max(p.layer for pairs in points for p in pairs if p.layer is not None)
    trainer_layers = next(p.trainer.module for pairs in points for p in pairs if p.kind == RESIDUAL).rpartition(".")[0]
    tried = {f"{i}.{j}": pair for i, pairs in enumerate(points) for j, pair in enumerate(pairs) if len(pairs) > 1}
    apart: dict[str, float] = {}
    if tried:
        renamed = tuple(
            replace(p, point=n, rollout=replace(p.rollout, point=n), trainer=replace(p.trainer, point=n))
            for n, p in tried.items()
        )
        mapping = ModelMap(renamed, layers, trainer_layers)
        own = trainer_side.record(Side(network, mapping), batch, folder / "tried-own")
        forced = teacher_forcing.record(engine, batch, mapping.rollout_taps, folder / "tried", route=Route.prefill)
        for name in tried:
            rows = common_rows(forced.recording.table(name), own.table(name))
            width = own.width(name)
            apart[name] = float(differences(forced.recording, own, name, rows, width=width).relative_N.mean())
        own.delete(), forced.recording.delete()
    chosen = [
        min(enumerate(pairs), key=lambda found, i=i: apart.get(f"{i}.{found[0]}", 0.0))[1]
        for i, pairs in enumerate(points)
        if pairs
    ]
    return ModelMap(tuple(chosen), layers, trainer_layers)


__all__ = ["derive", "mapping_of"]
