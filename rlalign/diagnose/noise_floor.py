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
    from rlalign.rollout.engine import VLLMEngine

KEPT = ("k1", "k3", "abs_mean", "p99", "abs_max")
CHUNK = 16  # tokens prefilled at once in the chunked run


def measure(
    engine: VLLMEngine, model: Path, config: RunConfig, batch: RolloutBatch, *, body: str
) -> dict[str, dict | None]:
    """Mismatch of the engine with itself by source: repeat, batch_of_one, decode, prefix_cache, chunked_prefill.

    batch: sequences this engine sampled at temperature 1. Each entry has the keys k1 k3 abs_mean p99 abs_max (nats) between a
    scoring of the whole batch and one that differs in the named way, or is None where the batch could not exercise it;
    `floor` is the worst source for each key.
    """
    whole_BL, mask_BL = scores(engine, batch), batch.loss_mask_BL
    alone = [_widen(scores(engine, batch.rows(slice(i, i + 1))), whole_BL) for i in range(len(batch))]
    found = {
        "repeat": _compare(whole_BL, scores(engine, batch), mask_BL),
        "batch_of_one": _compare(whole_BL, torch.cat(alone), mask_BL),
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


def scores(engine: VLLMEngine, batch: RolloutBatch) -> Tensor:
    """[B, L] float32: the engine's teacher-forced logprobs of the batch, 0.0 on padding."""
    lengths = batch.attention_mask_BL.sum(1).tolist()
    sequences = [ids[:n].tolist() for ids, n in zip(batch.token_ids_BL, lengths, strict=True)]
    scores_BL = torch.zeros(batch.token_ids_BL.shape)
    for i, logprobs in enumerate(engine.score(sequences)):
        scores_BL[i, : len(logprobs)] = torch.tensor(logprobs)
    return scores_BL


def _compare(one_BL: Tensor, other_BL: Tensor, mask_BL: Tensor) -> dict[str, float]:
    measured = mismatch.compare(one_BL, other_BL, mask_BL, positions=False)
    return {key: measured[key] + 0.0 for key in KEPT}  # + 0.0: no minus sign before a zero


def _widen(scores_1L: Tensor, like_BL: Tensor) -> Tensor:
    return torch.nn.functional.pad(scores_1L, (0, like_BL.shape[1] - scores_1L.shape[1]))


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
    from rlalign.rollout.engine import VLLMEngine

    rollout = replace(config.rollout, temperature=1.0, max_num_batched_tokens=CHUNK, max_num_seqs=CHUNK)
    engine = VLLMEngine(model, rollout, dtype=body, head_dtype=config.head_dtype.value, seed=config.seed)
    try:
        return scores(engine, batch)
    finally:
        engine.close()


def markdown(floors: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """One table over all bodies, ready to paste."""
    lines = ["**noise floor: the rollout engine against itself** (nats per token)", ""]
    lines += ["| body | source | " + " | ".join(KEPT) + " |", "|---" * (2 + len(KEPT)) + "|"]
    for body, sources in floors.items():
        for name, source in sources.items():
            cells = ["not exercised"] * len(KEPT) if source is None else [f"{source[key]:.2e}" for key in KEPT]
            lines.append(f"| {body} | {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
