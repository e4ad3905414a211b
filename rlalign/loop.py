"""One step, written out. `collect`: sample, reward. `learn`: score, compare, correct, train, publish."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from torch import Tensor

from rlalign import advantages, mismatch, objective
from rlalign.config import GateAction, MismatchConfig, RunConfig
from rlalign.parties import Collected, MismatchLimitError, Parties, Prompt, StepResult, Task, Trainer
from rlalign.reward.mixture import Sample
from rlalign.step_metrics import (
    correction_metrics,
    lag_of,
    mismatch_metrics,
    publish_metrics,
    rollout_metrics,
    staleness_metrics,
)
from rlalign.types import Correction, Rollout, TrainBatch, collate


def train_step(step: int, parties: Parties, config: RunConfig) -> StepResult:
    """Run step `step` (from 0). Raises MismatchLimitError before anything was trained when the gate is set to stop."""
    began = time.perf_counter()
    result = learn(step, collect(step, parties, config), parties, config)
    result.metrics["time/step_s"] = time.perf_counter() - began
    return result


def collect(step: int, parties: Parties, config: RunConfig) -> Collected:
    """Sample the step's completions and reward them."""
    metrics: dict[str, float] = {}
    clock = partial(_timed, metrics)
    with clock("rollout"):
        prompts = parties.task.train_prompts(step, config.rollout.prompts_per_step)
        rollouts = parties.engine.generate(
            [parties.encode(p.text) for p in prompts],
            prompt_ids=[p.prompt_id for p in prompts],
            samples=config.rollout.group_size,
            seed=step_seed(config, step),
        )
        batch = collate(rollouts, pad_token_id=parties.pad_token_id, spec=parties.engine.spec)
    metrics |= rollout_metrics(rollouts, metrics["time/rollout_s"])
    with clock("reward"):
        rewards = parties.reward([sample_of(r, prompts[r.group_id], parties.task) for r in rollouts])
    metrics |= rewards.metrics()
    return Collected(batch=batch, rewards=rewards, texts=[r.text for r in rollouts], metrics=metrics)


def learn(step: int, collected: Collected, parties: Parties, config: RunConfig) -> StepResult:
    """Score what was collected, compare, correct, train on it and publish the result."""
    batch, rewards, trainer = collected.batch, collected.rewards, parties.trainer
    metrics = dict(collected.metrics)
    clock = partial(_timed, metrics)
    with clock("score"):
        old_BL, entropy_BL = trainer.score(batch)
        ref_BL = trainer.score_reference(batch)
        measured = mismatch.compare(old_BL, batch.rollout_logprobs_BL, batch.loss_mask_BL, group_B=batch.group_id_B)
        metrics |= mismatch_metrics(measured, lag_of(batch, trainer.version), parties.floor)
        metrics |= staleness_metrics(batch, trainer.version)
        metrics["train/entropy"] = float(entropy_BL[batch.loss_mask_BL].mean())

    advantages_B = advantages.group_relative(
        rewards.values_B, batch.group_id_B, normalize_std=config.algo.normalize_std
    )
    result = StepResult(
        metrics=metrics,
        version=trainer.version,
        batch=batch,
        old_logprobs_BL=old_BL,
        entropy_BL=entropy_BL,
        advantages_BL=advantages_B[:, None].expand_as(old_BL),
        rewards=rewards,
        texts=collected.texts,
    )
    result.warnings.extend(gate(result, measured, config.mismatch, step=step))

    with clock("train"):
        rewarded = replace(batch, loss_mask_BL=batch.loss_mask_BL & rewards.known_B[:, None])
        correction = objective.correct(old_BL, rewarded, result.advantages_BL, config.algo)
        metrics |= correction_metrics(correction, old_BL, rewarded)
        metrics |= update(trainer, result, ref_BL, correction, config)

    with clock("publish"):
        report = parties.publish(trainer.named_weights(), trainer.version)
    metrics |= publish_metrics(report)
    return result


def step_seed(config: RunConfig, step: int) -> int:
    """The seed of a step's rollouts: the same after a resume, and in a replay."""
    return config.seed * 1_000_003 + step


def update(
    trainer: Trainer, scored: StepResult, ref_BL: Tensor | None, correction: Correction, config: RunConfig
) -> dict[str, float]:
    """One optimizer step per minibatch; metrics are means over the kept tokens of each, averaged over minibatches."""
    minibatches = config.algo.minibatches
    size = len(scored.batch) // minibatches
    loss_function = partial(objective.policy_loss, algo=config.algo, max_tokens=config.rollout.max_tokens)
    sums: dict[str, float] = {}
    last: dict[str, float] = {}
    for start in range(0, len(scored.batch), size):
        rows = slice(start, start + size)
        kept = correction.rows(rows)
        minibatch = TrainBatch(
            rollouts=scored.batch.rows(rows),
            old_logprobs_BL=scored.old_logprobs_BL[rows],
            advantages_BL=scored.advantages_BL[rows],
            correction=kept,
            num_tokens=int(kept.keep.sum()),
            num_sequences=int(kept.keep.any(-1).sum()),
            ref_logprobs_BL=None if ref_BL is None else ref_BL[rows],
        )
        if minibatch.num_tokens == 0:
            raise RuntimeError(
                "the correction rejected every token of a minibatch: nothing is left to train on; loosen its bounds"
            )
        for name, value in trainer.forward_backward(minibatch, loss_function).items():
            sums[name] = sums.get(name, 0.0) + value / minibatches
        last = trainer.optim_step()
    return {f"train/{name}": value for name, value in (sums | last).items()}


def gate(scored: StepResult, measured: dict[str, float], config: MismatchConfig, *, step: int) -> list[str]:
    """Compare k3 with its limit. Returns warnings, or raises MismatchLimitError, as configured. NaN passes no limit."""
    k3 = measured["k3"]
    if k3 <= config.k3_limit:
        return []
    message = (
        f"step {step}: mismatch k3 = {k3:.3g} nats/token is over mismatch.k3_limit = {config.k3_limit:.3g} "
        f"(mean |log_ratio| {measured['abs_mean']:.3g}, max {measured['abs_max']:.3g}, {measured['nonfinite']:.0f} not finite). "
        "Usual causes: a head in another dtype on one side, weights that did not arrive, another temperature or tokenizer. "
        "`rlalign parity` on this checkpoint tells the first from the rest."
    )
    if config.action is GateAction.stop:
        raise MismatchLimitError(message, scored)
    return [message]


def sample_of(rollout: Rollout, prompt: Prompt, task: Task) -> Sample:
    """What the reward needs to know of a rollout, the verifier's word included."""
    return Sample(
        prompt=prompt.text,
        completion=rollout.text,
        verified=task.reward(prompt, rollout.text),
        group=rollout.group_id,
        tokens=sum(rollout.loss_mask),
    )


@contextmanager
def _timed(metrics: dict[str, float], phase: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    metrics[f"time/{phase}_s"] = time.perf_counter() - began
