"""The noise floor: the rollout engine against itself, at fixed weights. Mismatch below it is not the trainer's doing.

Each source changes one thing that must not matter in exact arithmetic. B sequences, L padded length.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign import mismatch
from rlalign.config import RunConfig
from rlalign.types import RolloutBatch

if TYPE_CHECKING:
    from rlalign.rollout.engine.embedded import VLLMEngine

KEPT = ("k1", "k3", "abs_mean", "p99", "abs_max")
CHUNK = 16  # tokens prefilled at once in the chunked run
FEW = 32  # sequences of the floor beside a single figure


def measure(
    engine: VLLMEngine, model: Path, config: RunConfig, batch: RolloutBatch, *, body: str
) -> dict[str, dict | None]:
    """Mismatch of the engine with itself by source: repeat, batch_of_one, decode, prefix_cache, chunked_prefill.

    batch: sequences this engine sampled at temperature 1. Each entry has the keys k1 k3 abs_mean p99 abs_max (nats) between a
    scoring of the whole batch and one that differs in the named way, or is None where the batch could not exercise it;
    `floor` is the worst source for each key.
    """
    whole_BL, mask_BL = scores(engine, batch), batch.loss_mask_BL
    found = {
        "repeat": _compare(whole_BL, scores(engine, batch), mask_BL),
        "batch_of_one": _compare(whole_BL, scores(engine, batch, at_once=1), mask_BL),
        "decode": _compare(whole_BL, batch.rollout_logprobs_BL, mask_BL),
        "prefix_cache": _cold_against_cached(engine, batch),
        "chunked_prefill": _compare(whole_BL, _chunked(model, config, batch, body), mask_BL),
    }
    measured = [source for source in found.values() if source is not None]
    return found | {"floor": {key: max(abs(source[key]) for source in measured) for key in KEPT}}


def read(path: Path, body: str) -> dict[str, float]:
    """The floor of one body dtype from a file that `rlalign parity --noise-floor --json FILE` wrote."""
    try:
        floors = json.loads(path.read_text())["noise_floor"]
        return {name: float(value) for name, value in floors[body]["floor"].items()}
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"mismatch.floor={str(path)!r} holds no noise floor for a {body} body ({type(error).__name__}: {error}); "
            "write one with `rlalign parity --noise-floor --json FILE`"
        ) from error


def scores(engine: VLLMEngine, batch: RolloutBatch, *, at_once: int = 0) -> Tensor:
    """[B, L] float32: the engine's teacher-forced logprobs of the batch, 0.0 on padding.

    at_once: sequences given to the engine together, 0 for all.
    """
    lengths = batch.attention_mask_BL.sum(1).tolist()
    sequences = [ids[:n].tolist() for ids, n in zip(batch.token_ids_BL, lengths, strict=True)]
    scores_BL = torch.zeros(batch.token_ids_BL.shape)
    size = at_once or len(sequences)
    for start in range(0, len(sequences), size):
        for i, logprobs in enumerate(engine.score(sequences[start : start + size]), start):
            scores_BL[i, : len(logprobs)] = torch.tensor(logprobs)
    return scores_BL


def of_scoring(engine: VLLMEngine, batch: RolloutBatch, scored_BL: Tensor) -> dict[str, float]:
    """{"floor_k3", "floor_abs_mean"} of a scoring as the engine is now: the first sequences again, together and each alone."""
    few = batch.rows(slice(0, FEW))
    runs = [of_difference(scores(engine, few, at_once=size), scored_BL[:FEW], few) for size in (0, 1)]
    return {key: max(run[key] for run in runs) for key in runs[0]}


def of_difference(one_BL: Tensor, other_BL: Tensor, batch: RolloutBatch) -> dict[str, float]:
    """{"floor_k3", "floor_abs_mean"} between two answers of the engine about the same tokens."""
    compared = _compare(one_BL, other_BL, batch.loss_mask_BL)
    return {"floor_k3": compared["k3"], "floor_abs_mean": compared["abs_mean"]}


def of_repeated_sampling(again: RolloutBatch, batch: RolloutBatch) -> dict[str, float]:
    """The same of the first sequences sampled again with their seeds in another batch, up to the first token that differs."""
    rows, length = len(again), min(again.token_ids_BL.shape[1], batch.token_ids_BL.shape[1])
    again_BL, ids_BL = again.token_ids_BL[:, :length], batch.token_ids_BL[:rows, :length]
    same_BL = (again_BL == ids_BL).cumprod(1).bool()
    mask_BL = same_BL & again.loss_mask_BL[:, :length] & batch.loss_mask_BL[:rows, :length]
    compared = _compare(again.rollout_logprobs_BL[:, :length], batch.rollout_logprobs_BL[:rows, :length], mask_BL)
    return {"floor_k3": compared["k3"], "floor_abs_mean": compared["abs_mean"]}


def _compare(one_BL: Tensor, other_BL: Tensor, mask_BL: Tensor) -> dict[str, float]:
    measured = mismatch.compare(one_BL, other_BL, mask_BL, positions=False)
    return {key: measured[key] + 0.0 for key in KEPT}  # + 0.0: no minus sign before a zero


def _cold_against_cached(engine: VLLMEngine, batch: RolloutBatch) -> dict[str, float] | None:
    """The last token of every sequence, decoded with an empty prefix cache and once more from its blocks.

    None when no sequence is long enough to fill a block: then nothing was measured, which is not the same as zero.
    """
    last_B = (batch.attention_mask_BL.sum(1) - 1).tolist()
    prefixes = [ids[:last].tolist() for ids, last in zip(batch.token_ids_BL, last_B, strict=True)]
    tokens = [int(ids[last]) for ids, last in zip(batch.token_ids_BL, last_B, strict=True)]
    engine.reset_prefix_cache()
    cold, _ = engine.next_logprobs(prefixes, tokens)
    cached, from_cache = engine.next_logprobs(prefixes, tokens)
    if not from_cache:
        return None
    return _compare(torch.tensor([cold]), torch.tensor([cached]), torch.ones(1, len(cold), dtype=torch.bool))


def _chunked(model: Path, config: RunConfig, batch: RolloutBatch, body: str) -> Tensor:
    from rlalign.rollout.engine.embedded import VLLMEngine

    rollout = replace(config.rollout, temperature=1.0, max_num_batched_tokens=CHUNK, max_num_seqs=CHUNK)
    kinds = {"dtype": body, "head_dtype": config.head_dtype.value, "seed": config.seed, "exact": config.exact}
    engine = VLLMEngine(model, rollout, **kinds)
    try:
        return scores(engine, batch)
    finally:
        engine.close()


def markdown(floors: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """One table over all bodies, ready to paste."""
    lines = [
        "**noise floor: each side against itself; `floor`: the worst of the engine plus the worst of the trainer** (nats)",
        "",
    ]
    lines += ["| body | source | " + " | ".join(KEPT) + " |", "|---" * (2 + len(KEPT)) + "|"]
    for body, sources in floors.items():
        for name, source in sources.items():
            cells = ["not exercised"] * len(KEPT) if source is None else [f"{source[key]:.2e}" for key in KEPT]
            lines.append(f"| {body} | {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
