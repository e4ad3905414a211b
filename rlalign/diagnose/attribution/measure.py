"""The measurement: both sides on the same tokens, every matching point compared, isolated, and patched."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from rlalign.diagnose.attribution import trainer_side
from rlalign.diagnose.attribution.derived import mapping_of
from rlalign.diagnose.attribution.difference import Spread, compared
from rlalign.diagnose.attribution.findings import Attribution, engine_against_itself
from rlalign.diagnose.attribution.mapping import Pairs
from rlalign.diagnose.attribution.route import Setup, attribute_route
from rlalign.diagnose.attribution.trainer_side import Side
from rlalign.rollout.engine import teacher_forcing
from rlalign.rollout.engine.embedded import VLLMEngine
from rlalign.rollout.engine.teacher_forcing import Route
from rlalign.trainer.head_mirror import mirror
from rlalign.types import RolloutBatch

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
