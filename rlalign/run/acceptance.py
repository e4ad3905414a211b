"""Accept an update or roll it back, by the gap that the rollout engine shows once it computes with the new weights.

The gate of a step judges the batch it trains on, sampled before the update; what the update itself does to the gap is seen one step
later, after it was trained on. Here a few held-out completions are sampled and scored first: past the limit the policy goes back to
what it was, bit for bit, optimizer included, and the engine gets those weights again. Reference: arXiv 2606.29526.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlalign import mismatch, ranks
from rlalign.run.scoring_step import scored
from rlalign.types import collate

if TYPE_CHECKING:
    from rlalign.config import RunConfig
    from rlalign.run.parties import Parties, Trainer

FOLDER = "candidate"  # inside the run's directory: the policy before the update that is being judged
SEED = 2**20  # far from the seeds of steps, probes and of evaluation


def keep(trainer: Trainer, config: RunConfig) -> None:
    """Write down the policy as it is, before an update. Every trainer rank must call it."""
    trainer.save_state(_folder(config))


def judge(step: int, parties: Parties, config: RunConfig) -> tuple[dict[str, float], str | None]:
    """(metrics, why the update is refused or None), with the engine already on the new weights. NaN is refused."""
    prompts = parties.task.eval_prompts()[: config.mismatch.accept_prompts]
    rollouts = parties.sample(prompts, samples=1, seed=config.seed * 1_000_003 + step + SEED)
    batch = collate(rollouts, pad_token_id=parties.pad_token_id, spec=parties.engine.spec)
    batch, old_BL, *_ = scored(parties.trainer, batch)
    found = mismatch.compare(
        old_BL, batch.rollout_logprobs_BL, batch.loss_mask_BL, lag_B=torch.zeros(len(batch)).long(), positions=False
    )
    k3, limit = found["lag0/k3"], config.mismatch.accept_k3
    refused = not k3 <= limit
    metrics = {"accept/k3": k3, "accept/tokens": found["tokens"], "accept/refused": float(refused)}
    if not refused:
        return metrics, None
    return metrics, (
        f"step {step}: update refused: with its weights the engine is k3 = {k3:.3g} nats/token from the trainer on "
        f"{found['tokens']:.0f} held-out tokens, over mismatch.accept_k3 = {limit:.3g}; the policy is back at the version before"
    )


def restore(trainer: Trainer, config: RunConfig) -> None:
    """Go back to what `keep` wrote down, version included."""
    trainer.load_state(_folder(config))


def forget(config: RunConfig) -> None:
    """Remove what `keep` wrote down."""
    ranks.on_first(lambda: shutil.rmtree(_folder(config), ignore_errors=True))


def _folder(config: RunConfig) -> Path:
    return Path(config.output_dir) / FOLDER
