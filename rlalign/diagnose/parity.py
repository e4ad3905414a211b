"""rlalign parity: the same tokens through rollout engine and trainer, at identical weights, for every pair of heads.

Rows are rollout head x trainer head for each body dtype. Both sides are teacher-forced at temperature 1, so the table isolates
numerics: no sampling, no staleness. The head in isolation is measured beside it, since the body can hide the head.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from rlalign import mismatch
from rlalign.assemble import load_tokenizer, resolve_model
from rlalign.config import RunConfig
from rlalign.diagnose import head_isolation, noise_floor
from rlalign.diagnose.both_sides import sample, trainer_network, trainer_scores
from rlalign.types import RolloutBatch

if TYPE_CHECKING:
    from rlalign.rollout.engine import VLLMEngine

HEADS = ("model", "float32")
COLUMNS = {
    "k1": "k1",
    "k3": "k3",
    "abs_mean": "abs_mean",
    "p99": "p99",
    "abs_max": "abs_max",
    "pearson": "pearson_prob",
}
ERRORS = ("rollout_error", "trainer_error")  # of the head in isolation: mean distance from float64
ISOLATED_TOKENS = 256


def measure(
    config: RunConfig, *, bodies: Sequence[str] | None = None, prompts: int = 32, with_noise_floor: bool = False
) -> dict:
    """Fill the table on the configured model. Returns {"model", "tokens", "rows", "head_isolated"}, JSON-able, in nats.

    bodies: dtypes of the model's body, both by default. prompts: how many of the task's training prompts are sampled from.
    with_noise_floor: adds {"noise_floor": {body: {source: ...}}}, the engine against itself (see `noise_floor.measure`).
    """
    model = resolve_model(config.model.path)
    result = {"model": config.model.path, "tokens": {}, "rows": [], "head_isolated": []}
    if with_noise_floor:
        result["noise_floor"] = {}
    for body in bodies or ("bfloat16", "float32"):
        _one_body(model, config, body, prompts, result)
    return result


def over_limit(result: dict, limit: float) -> list[str]:
    """One line for every float32/float32 pair whose k3 is over the limit (or not a number)."""
    return [
        f"{r['body_dtype']} body, float32 heads on both sides: k3 = {r['k3']:.3g} nats/token is over the limit {limit:.3g}"
        for r in result["rows"]
        if r["rollout_head"] == r["trainer_head"] == "float32" and not r["k3"] <= limit
    ]


def table(result: dict) -> str:
    """Both tables as Markdown, ready to paste."""
    lines = [f"Teacher-forced through both engines: {result['model']}, tokens {result['tokens']}", ""]
    for title, rows, columns in (
        ("whole model", result["rows"], tuple(COLUMNS)),
        ("head in isolation", result["head_isolated"], (*COLUMNS, *ERRORS)),
    ):
        header = ["body", "rollout head", "trainer head", *columns]
        lines += [f"**{title}** (nats per token)", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for row in rows:
            numbers = [f"{row[c]:.9f}" if c == "pearson" else f"{row[c]:.2e}" for c in columns]
            lines.append(
                "| " + " | ".join([row["body_dtype"], row["rollout_head"], row["trainer_head"], *numbers]) + " |"
            )
        lines.append("")
    if "noise_floor" in result:
        lines.append(noise_floor.markdown(result["noise_floor"]))
    return "\n".join(lines)


def _one_body(model: Path, config: RunConfig, body: str, prompts: int, result: dict) -> None:
    from rlalign.rollout.engine import VLLMEngine

    rollout = replace(config.rollout, temperature=1.0)
    engine = VLLMEngine(model, rollout, dtype=body, head_dtype="float32", seed=config.seed)
    try:
        tokenizer = load_tokenizer(model)
        batch, _ = sample(engine, tokenizer, config, prompts=prompts, samples=config.rollout.group_size)
        result["tokens"][body] = int(batch.loss_mask_BL.sum())
        network = trainer_network(model, body)
        for rollout_head in HEADS:
            engine.set_head("off" if rollout_head == "model" else engine.mode)
            rollout_BL = noise_floor.scores(engine, batch)
            for trainer_head in HEADS:
                pair = {"body_dtype": body, "rollout_head": rollout_head, "trainer_head": trainer_head}
                trainer_BL, hidden_BLD = trainer_scores(network, batch, trainer_head, temperature=1.0)
                measured = mismatch.compare(trainer_BL, rollout_BL, batch.loss_mask_BL, positions=False)
                result["rows"].append(pair | _columns(measured))
                isolated = _isolated(engine, network, hidden_BLD, batch, config)
                result["head_isolated"].append(pair | isolated)
        if "noise_floor" in result:
            result["noise_floor"][body] = noise_floor.measure(engine, model, config, batch, body=body)
    finally:
        engine.close()
        gc.collect()  # two engines follow each other in one process


def _isolated(
    engine: VLLMEngine, network: nn.Module, hidden_BLD: Tensor, batch: RolloutBatch, config: RunConfig
) -> dict[str, float]:
    hidden, ids = head_isolation.predicting(hidden_BLD, batch.token_ids_BL, batch.loss_mask_BL, limit=ISOLATED_TOKENS)
    shared = Path(config.weights.shared)
    measured = head_isolation.measure(engine, network, hidden, ids, temperature=1.0, shared=shared)
    return _columns(measured) | {error: measured[error] for error in ERRORS}


def _columns(measured: dict[str, float]) -> dict[str, float]:
    return {name: measured[key] + 0.0 for name, key in COLUMNS.items()}  # + 0.0: no minus sign before a zero
