"""The measurement: both sides on the same tokens, every matching point compared, isolated, and patched.

Suffixes: B sequences, L padded length, N tokens.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rlalign.diagnose.attribution import trainer_side
from rlalign.diagnose.attribution.derived import mapping_of
from rlalign.diagnose.attribution.findings import (
    Attribution,
    Bias,
    PointDifference,
    RouteAttribution,
    Spread,
    TokenDifferences,
    bias,
    bias_floor,
    common_rows,
    compared,
    counted,
    differences,
    distinct,
    engine_against_itself,
    one_unit,
    scored,
    worst,
)
from rlalign.diagnose.attribution.mapping import LOGITS, ROUTER, Pairs
from rlalign.diagnose.attribution.trainer_side import LOGPROBS, Side
from rlalign.rollout.engine import teacher_forcing
from rlalign.rollout.engine.embedded import VLLMEngine
from rlalign.rollout.engine.teacher_forcing import Forced, Route
from rlalign.rollout.worker.recording import POSITION, Recording
from rlalign.trainer.head_mirror import mirror
from rlalign.types import LogprobSpec, Rollout, RolloutBatch, collate

__all__ = ["measure", "prove_steps"]

ARCHITECTURE = (
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "tie_word_embeddings", "num_experts", "num_experts_per_tok", "num_local_experts",
)  # fmt: skip


def measure(
    engine: VLLMEngine,
    network: nn.Module,
    batch: RolloutBatch,
    *,
    routes: Sequence[Route] = (Route.prefill, Route.decode),
    pairs: Pairs | None = None,
    chunked: VLLMEngine | None = None,
    rows: int = 0,
    patch: bool = True,
    scratch: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Attribution:
    """Attribute the mismatch between a live engine and a trainer's model on these sequences.

    Both should hold the same weights: weights that differ show as steps over their floor. batch: its loss mask says which
    tokens are scored. chunked: a second engine with another chunking, for the floor. rows: sequences in one forward of the
    trainer, 0 for all. scratch: where recordings lie meanwhile. Raises ValueError for an architecture that `pairs` does not
    fit or for two different ones, RuntimeError for an engine that cannot be captured.
    """
    if engine.spec.head_dtype == "master":
        raise ValueError(
            "attribution compares float32 or model heads; start both sides with head_dtype=float32, not master"
        )
    require_same_architecture(engine, network)
    mapping = mapping_of(engine, network, batch, pairs, scratch)
    mirror(network, head_dtype=engine.spec.head_dtype, chunk=0)
    folder = Path(tempfile.mkdtemp(prefix="rlalign-attribution-", dir=scratch))
    try:
        say("trainer: in its own and in wider arithmetic")
        side = Side(network, mapping, rows)
        wide = trainer_side.widened(side)
        own = trainer_side.record(side, batch, folder / "own")
        exact = trainer_side.record(wide, batch, folder / "exact")
        forced = {}
        for route in routes:
            say(f"rollout engine: {route.value}")
            forced[route] = teacher_forcing.record(
                engine, batch, mapping.rollout_taps, folder / route.value, route=route
            )
        widths = {point: own.width(point) for point in mapping.points()}
        reference = forced.get(Route.prefill) or teacher_forcing.record(
            engine, batch, mapping.rollout_taps, folder / "reference", route=Route.prefill
        )
        floors = engine_against_itself(engine, chunked, batch, mapping, widths, reference, folder, say)
        setup = Setup(engine, batch, side, wide, own, exact, floors, folder, patch, say)
        found = {route.value: attribute_route(setup, route, forced[route]) for route in routes}
        recordings = [f.recording for f in forced.values()]
        return Attribution(
            model=type(network).__name__,
            body_dtype=str(next(network.parameters()).dtype).removeprefix("torch."),
            head_dtype=engine.spec.head_dtype,
            tensor_parallel=recordings[0].ranks,
            layers=mapping.layers,
            sequences=len(batch),
            length=batch.token_ids_BL.shape[1],
            scored_tokens=int(batch.loss_mask_BL.sum()),
            routes=found,
            decode_against_prefill={
                point: Spread.of(compared(recordings[1], recordings[0], point, batch, width, Route.decode).relative_N)
                for point, width in (widths.items() if len(recordings) == 2 else ())
            },
            floor_sources=("alone", *(["chunked"] if chunked else []), "rounding"),
            disk_bytes=sum(r.nbytes for r in (*recordings, own, exact)),
        )
    finally:
        shutil.rmtree(folder)


def require_same_architecture(engine: VLLMEngine, network: nn.Module) -> None:
    """Raise ValueError naming every dimension in which the two configurations differ."""
    rollout = engine.architecture()
    trainer = network.config.to_dict()
    wrong = [
        f"{f}: {rollout.get(f)} against {trainer.get(f)}" for f in ARCHITECTURE if rollout.get(f) != trainer.get(f)
    ]
    if wrong:
        raise ValueError(f"mismatched checkpoints: rollout engine and trainer differ in {'; '.join(wrong)}")


ROPE = ("q_rope", "k_rope")  # one rounded cosine turns every token of its position: their errors are not independent
HEAT_POSITIONS = 160  # columns of the heat map; longer sequences are averaged into as many


@dataclass(frozen=True, slots=True)
class Setup:
    """What both routes share. own, exact: recordings of the trainer in its own and in wider arithmetic; floors: of the engine."""

    engine: VLLMEngine
    batch: RolloutBatch
    side: Side
    wide: Side
    own: Recording
    exact: Recording
    floors: dict[str, Spread]
    folder: Path
    patch: bool
    say: Callable[[str], None]


def attribute_route(setup: Setup, route: Route, forced: Forced) -> RouteAttribution:
    """Every number of one route."""
    batch, mapping, say = setup.batch, setup.side.mapping, setup.say
    temperature = 1.0 if route is Route.prefill else setup.engine.spec.temperature
    say(f"{route.value}: each of the trainer's modules on the rollout's inputs")
    isolated = trainer_side.record(setup.side, batch, setup.folder / "isolated", inputs=forced.recording)
    exact = trainer_side.record(setup.wide, batch, setup.folder / "isolated-exact", inputs=forced.recording)
    points, heat, unit = [], {}, one_unit(next(setup.side.network.parameters()).dtype)
    for point in mapping.points():
        width = setup.own.width(point)
        found = compared(forced.recording, setup.own, point, batch, width, route)
        rows = counted(forced.recording, isolated, point, batch, route)
        step = differences(forced.recording, isolated, point, rows, width=width)
        fresh = distinct(forced.recording, point, rows, batch)
        tilt = bias(forced.recording, isolated, point, fresh, width=width) if _kind(point) not in ROPE else Bias()
        rounding = Spread.of(compared(setup.own, setup.exact, point, batch, width).relative_N)
        step_floor = compared(isolated, exact, point, batch, width)
        points.append(_point(point, found, worst(setup.floors.get(point), rounding), step, step_floor, unit, tilt))
        heat[point] = by_position(found, batch.token_ids_BL.shape[1])
    for recording in (isolated, exact):
        recording.delete()
    own_BL = trainer_side.logprobs(setup.side, batch, head_dtype=setup.engine.spec.head_dtype, temperature=temperature)
    points.append(_logprob_point(setup, forced, own_BL, temperature))
    heat[LOGPROBS] = by_position(scored(forced.logprobs_BL, own_BL, batch), batch.token_ids_BL.shape[1])
    removed: list[trainer_side.Removed] = []
    if setup.patch:
        say(f"{route.value}: logprob attribution, {len(trainer_side.cuts(mapping)) + 1} cuts")
        removed = trainer_side.attribute(
            setup.side, batch, forced.recording, forced.logprobs_BL, own_BL,
            head_dtype=setup.engine.spec.head_dtype, temperature=temperature,
        )  # fmt: skip
    delta_N = (own_BL - forced.logprobs_BL)[batch.loss_mask_BL].double()
    return RouteAttribution(
        route=route.value,
        temperature=temperature,
        points=tuple(points),
        removed=tuple(removed),
        delta_logp={
            "mean": float(delta_N.mean()),
            "abs_mean": float(delta_N.abs().mean()),
            "abs_max": float(delta_N.abs().max()),
        },
        heat=heat,
        experts_differ=experts_differ(forced.recording, setup.own, setup.side),
    )


def _kind(point: str) -> str:
    """ "q_rope" of "layers.3.q_rope"; a point outside the layers is its own kind."""
    return point.rpartition(".")[2]


def by_position(found: TokenDifferences, length: int) -> tuple[float | None, ...]:
    """Mean relative difference by position, neighbours together where there are more than a map can show."""
    bins = min(length, HEAT_POSITIONS)
    place_N = found.rows_N3[:, POSITION] * bins // length
    sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, place_N, found.relative_N)
    counts = torch.zeros(bins, dtype=torch.float64).index_add_(0, place_N, torch.ones_like(found.relative_N))
    return tuple(float(s / n) if n else None for s, n in zip(sums, counts, strict=True))


def _point(
    point: str,
    found: TokenDifferences,
    floor: Spread,
    step: TokenDifferences,
    step_floor: TokenDifferences,
    unit: Spread,
    tilt: Bias,
) -> PointDifference:
    """step: the difference of this step alone; unit: what rounding once more makes of a value."""
    kind = _kind(point)
    return PointDifference(
        point=point,
        kind=kind,
        layer=int(point.split(".")[1]) if point != kind else None,
        tokens=len(found.rows_N3),
        absolute=Spread.of(found.absolute_N),
        relative=Spread.of(found.relative_N),
        cosine=float(found.cosine_N.mean()),
        cosine_min=float(found.cosine_N.min()),
        floor=worst(floor, unit),
        isolated=Spread.of(step.relative_N),
        isolated_floor=worst(Spread.of(step_floor.relative_N), unit),
        bias=tilt,
        bias_floor=bias_floor(unit),
    )


def _logprob_point(setup: Setup, forced: Forced, own_BL: Tensor, temperature: float) -> PointDifference:
    """The logprobs as a last point: isolated, they are the trainer's normalisation of the rollout's logits."""
    batch = setup.batch
    step_BL = trainer_side.from_logits(forced.recording, batch, temperature, torch.float32)
    exact_BL = trainer_side.from_logits(forced.recording, batch, temperature, torch.float64)
    rounded_BL = trainer_side.from_logits(setup.exact, batch, temperature, torch.float64)
    found, step = scored(forced.logprobs_BL, own_BL, batch), scored(forced.logprobs_BL, step_BL, batch)
    floor = worst(setup.floors.get(LOGPROBS), Spread.of(scored(own_BL, rounded_BL, batch).relative_N))
    step_floor = scored(step_BL, exact_BL, batch)
    return _point(LOGPROBS, found, floor, step, step_floor, one_unit(torch.float32), Bias())


def experts_differ(rollout: Recording, trainer: Recording, side: Side) -> dict[int, float]:
    """{layer: share of the rollout's chosen experts that the trainer did not choose}; empty for a dense model.

    Chosen: the largest router logits, as many as the model takes per token. Raises ValueError where its config does not say.
    """
    found = {}
    for pair in (p for p in side.mapping.pairs if p.kind == ROUTER):
        width, chosen = trainer.width(pair.point), getattr(side.network.config, "num_experts_per_tok", None)
        if chosen is None:
            raise ValueError(f"{type(side.network).__name__} has routers, but its config names no num_experts_per_tok")
        rows_N, other_rows_N = common_rows(rollout.table(pair.point), trainer.table(pair.point))
        one_NK = _chosen(rollout.read(pair.point, rows_N, width=width), chosen)
        other_NK = _chosen(trainer.read(pair.point, other_rows_N, width=width), chosen)
        shared_N = (one_NK[:, :, None] == other_NK[:, None, :]).any(2).sum(1)
        found[pair.layer] = 1 - float(shared_N.double().mean()) / chosen
    return found


def _chosen(logits_NE: Tensor, count: int) -> Tensor:
    return logits_NE.float().topk(count).indices


LIMIT = 0.1  # mean relative difference of one step: bfloat16 rounds it by 0.01, an unrelated weight moves it by 1
SEQUENCES, TOKENS = 4, 48  # of the probe
SHOWN = 4


def prove_steps(engine: VLLMEngine, network: nn.Module, *, scratch: Path | None = None) -> dict[str, float]:
    """Prove by output that the engine computes with the weights it took: what `measured_steps` gives, within LIMIT.

    The read-back of a publish compares an engine with what the engine's own loader makes of the weights, so that a loader which
    puts a right tensor in a wrong place vouches for itself. Here what each of the engine's modules made of random tokens is
    compared with what the trainer's module makes of the same input. Rounding moves a step by up to a few percent; a wrong slice, a
    wrong order or a neighbour's weight moves it as far as an unrelated one. Raises RuntimeError naming the steps beyond LIMIT.
    """
    found = measured_steps(engine, network, scratch=scratch)
    wrong = sorted((point for point, apart in found.items() if not apart <= LIMIT), key=lambda p: -found[p])
    if wrong:
        told = ", ".join(f"{point} by {found[point]:.0%}" for point in wrong[:SHOWN])
        more = f" and {len(wrong) - SHOWN} more steps" if len(wrong) > SHOWN else ""
        raise RuntimeError(
            f"the engine took the weights and computes something else with them: on its own inputs the trainer's modules differ at "
            f"{told}{more} (limit {LIMIT:.0%}). Its loader puts a tensor where it does not belong, or the two libraries mean "
            "different models by this configuration; rlalign attribute shows every step"
        )
    return found


def measured_steps(engine: VLLMEngine, network: nn.Module, *, scratch: Path | None = None) -> dict[str, float]:
    """{step: mean relative difference} on random tokens. network: whole on this rank, with the weights that were published.

    Raises ValueError where no step of this architecture can be compared.
    """
    network.eval()
    batch = _random_tokens(network.config.get_text_config().vocab_size, engine.config.max_model_len)
    mapping = mapping_of(engine, network, batch, None, scratch)
    with tempfile.TemporaryDirectory(prefix="rlalign-steps-", dir=scratch) as folder:
        forced = teacher_forcing.record(
            engine, batch, mapping.rollout_taps, Path(folder) / "engine", route=Route.prefill
        )
        isolated = trainer_side.record(Side(network, mapping), batch, Path(folder) / "trainer", inputs=forced.recording)
        return {
            point: float(compared(forced.recording, isolated, point, batch, isolated.width(point)).relative_N.mean())
            for point in mapping.points()
            if point != LOGITS
        }


def _random_tokens(vocabulary: int, longest: int) -> RolloutBatch:
    length = min(TOKENS, longest - 1)
    ids_BL = torch.randint(0, vocabulary, (SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    rollouts = [
        Rollout(
            token_ids=ids,
            loss_mask=[False, *[True] * (length - 1)],
            rollout_logprobs=[0.0] * length,
            prompt_id=i,
            group_id=i,
            finish_reason="length",
            version_spans=[(1, length, 0)],
        )
        for i, ids in enumerate(ids_BL.tolist())
    ]
    return collate(rollouts, pad_token_id=0, spec=LogprobSpec())
