"""Padded against packed rows in the trainer: one batch of very different lengths, scored and trained on.

python benchmarks/loop_packing.py [--write]     A random Qwen3 of 17 M parameters in bfloat16, real DeepSpeed, one rank.

"in order" is what contiguous micro-batches padded to the longest completion of the whole step cost; "sorted" what
trainer.pack_tokens=0 does; "packed" the same tokens in rows without padding.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from loop import build_model

from rlalign.config import AlgoConfig, TrainerConfig
from rlalign.objective import choice, corrections
from rlalign.trainer import passes
from rlalign.trainer.packing import MicroBatch
from rlalign.trainer.policy import Policy
from rlalign.types import LogprobSpec, Rollout, RolloutBatch, TrainBatch, collate

RESULTS = Path(__file__).parent / "results" / "loop.md"
B, PROMPT, MEDIAN, LONGEST = 32, 16, 96, 768  # sequences; tokens
MICRO_ROWS = 8
PACK_TOKENS = 2048
KINDS = {
    "in order, padded to the longest of the step": {"micro_batch_size": MICRO_ROWS},
    "sorted by length and cut": {"micro_batch_size": MICRO_ROWS},
    "packed": {"pack_tokens": PACK_TOKENS},
}


def main() -> None:
    """Measure, print, perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="append to results/loop.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    batch = skewed_batch()
    tokens = int(batch.attention_mask_BL.sum())
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(Path(folder), hidden=384, layers=6, vocabulary=8192)
        found = {name: measure(model, batch, name, arguments.rounds) for name in KINDS}
    text = table(found, tokens, batch.attention_mask_BL.numel())
    print(text)
    if arguments.write:
        with RESULTS.open("a") as file:
            file.write(text)


def skewed_batch() -> RolloutBatch:
    """Completions whose lengths are log-normal around the median, as those of a policy that reasons."""
    generator = torch.Generator().manual_seed(0)
    lengths = (MEDIAN * torch.randn(B, generator=generator).exp()).clamp(4, LONGEST).long().tolist()
    lengths[B // 2] = LONGEST
    rollouts = [
        Rollout(
            token_ids=torch.randint(3, 8_000, (PROMPT + n,), generator=generator).tolist(),
            loss_mask=[False] * PROMPT + [True] * n,
            rollout_logprobs=[0.0] * PROMPT + [-9.0] * n,
            prompt_id=i,
            group_id=i // 8,
            finish_reason="stop",
            version_spans=[(PROMPT, PROMPT + n, 0)],
        )
        for i, n in enumerate(lengths)
    ]
    return collate(rollouts, pad_token_id=0, spec=LogprobSpec())


def measure(model: Path, batch: RolloutBatch, name: str, rounds: int) -> dict[str, float]:
    """Median processor seconds of a scoring pass and of forward and backward; and the norm, which must not depend on it."""
    plan = passes.plan
    if name.startswith("in order"):
        passes.plan = in_order
    config = TrainerConfig(threads=1, **KINDS[name])
    algo = AlgoConfig(lr=0.0)
    policy = Policy(model, config, algo, dtype="bfloat16", head_dtype="float32", temperature=1.0, seed=0)
    loss = partial(choice.policy_loss, algo=algo, max_tokens=LONGEST)
    score, train, norm = [], [], 0.0
    for _ in range(rounds + 1):
        began = time.process_time()
        old_BL, _ = policy.score(batch)
        scored = time.process_time()
        correction = corrections.identity(old_BL, old_BL, batch.loss_mask_BL)
        advantages_BL = torch.linspace(-1, 1, B)[:, None].expand_as(old_BL)
        counts = {"num_tokens": int(correction.keep.sum()), "num_sequences": B}
        whole = TrainBatch(
            rollouts=batch, old_logprobs_BL=old_BL, advantages_BL=advantages_BL, correction=correction, **counts
        )
        ready = time.process_time()
        policy.forward_backward(whole, loss)
        score.append(scored - began)
        train.append(time.process_time() - ready)
        norm = policy.optim_step()["grad_norm"]
    policy.close()
    passes.plan = plan
    return {"score": statistics.median(score[1:]), "train": statistics.median(train[1:]), "norm": norm}


def in_order(lengths: list[int], *, rank: int, ranks: int, rows: int, tokens: int) -> list[MicroBatch]:
    """Contiguous micro-batches, every one as wide as the step."""
    width = max(lengths)
    return [MicroBatch(index_b=torch.arange(at, min(at + rows, B)), length=width) for at in range(0, B, rows)]


def table(found: dict[str, dict[str, float]], tokens: int, padded: int) -> str:
    """One section of results/loop.md."""
    first = next(iter(found.values()))
    lines = [
        f"\n## Packed rows: {B} sequences, {tokens} tokens, {padded} with padding",
        f"`python benchmarks/loop_packing.py`; Qwen3 17 M bfloat16, one thread, {os.cpu_count()} cores, torch "
        f"{torch.__version__}; micro-batches of {MICRO_ROWS} rows or {PACK_TOKENS} tokens; medians of processor time\n",
        "| rows | score, s | forward + backward, s | together | gradient norm |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, seconds in found.items():
        gain = (first["score"] + first["train"]) / (seconds["score"] + seconds["train"])
        lines.append(
            f"| {name} | {seconds['score']:.2f} | {seconds['train']:.2f} | {gain:.2f}x | {seconds['norm']:.5f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
