"""One step, written out. `collect`: sample, reward. `learn`: score, compare, correct, train, publish; accept the update or not."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rlalign import mismatch, ranks
from rlalign.config import RunConfig, ScheduleMode
from rlalign.logprobs.truncation import LIMIT
from rlalign.objective import choice
from rlalign.reward.mixture import Sample
from rlalign.run import limits
from rlalign.run import step_metrics as logged
from rlalign.run.parties import Collected, Learner, Parties, StepResult, Trainer, verified_of
from rlalign.run.sampler import Sampler, request, sample_probe, step_seed
from rlalign.tasks import Prompt, Task
from rlalign.tracking.timeline import Clock, Span
from rlalign.types import Rollout, RolloutBatch, TrainBatch, collate

ACCEPT_SEED = 3 * 2**18  # as far from the probes' seeds as from the evaluation's: 262,144 steps


def train_step(step: int, parties: Parties, config: RunConfig, sampler: Sampler | None = None) -> StepResult:
    """Run step `step` (from 0). sampler: of an asynchronous schedule.

    Raises MismatchLimitError or StalenessLimitError before anything was trained when the gate is set to stop.
    """
    began = time.perf_counter()
    result = learn(step, collect(step, parties, config, sampler), parties, config, sampler)
    seconds = time.perf_counter() - began
    phases = sum(value for name, value in result.metrics.items() if name.startswith("time/"))
    result.metrics.update({"time/step_s": seconds, "time/other_s": seconds - phases})
    return result


def collect(step: int, parties: Parties, config: RunConfig, sampler: Sampler | None = None) -> Collected:
    """Sample the step's completions, or take those that were sampled ahead, and reward them."""
    metrics: dict[str, float] = {}
    spans: list[Span] = []
    clock = Clock(step, metrics, spans, parties.say)
    with clock("rollout"):
        sampled = request(step, parties, config)(parties.engine) if sampler is None else sampler.take(step)
        rollouts = sampled.rollouts
        batch = collate(rollouts, pad_token_id=parties.pad_token_id, spec=parties.engine.spec)
    metrics |= logged.rollout_metrics(rollouts, sampled.seconds) | logged.outcome_metrics(rollouts)
    probe = None
    if sampler is not None:
        spans.append(Span("rollout", sampled.start, sampled.start + sampled.seconds, step))
        with clock("probe"):
            probe = _probe(step, batch, parties, config)
        sampler.run_ahead(step)
    with clock("reward"):
        prompts = parties.task.train_prompts(step, config.rollout.prompts_per_step)
        rewards = parties.reward([sample_of(r, prompts[r.group_id], parties.task) for r in rollouts])
    metrics |= rewards.metrics()
    texts = [r.text for r in rollouts]
    earned_BL = turns_earned(rollouts, rewards.values_B, batch)
    if any(r.turn_rewards for r in rollouts):
        metrics["turns/placed"] = float(earned_BL is not None)
    return Collected(
        batch=batch, rewards=rewards, texts=texts, metrics=metrics, spans=spans, earned_BL=earned_BL, probe=probe
    )


def turns_earned(rollouts: Sequence[Rollout], values_B: Tensor, batch: RolloutBatch) -> Tensor | None:
    """[B, L]: the turns' rewards at the ends of turns; None where no turn has one, or a sample's reward is not just their sum."""
    turns = [(row, position, reward) for row, r in enumerate(rollouts) for position, reward in r.turn_rewards]
    if not turns:
        return None
    earned_BL = torch.zeros(batch.token_ids_BL.shape, dtype=torch.float64)
    for row, position, reward in turns:
        earned_BL[row, position] += reward
    known_B = ~values_B.isnan()
    apart_B, size_B = (values_B.double() - earned_BL.sum(1)).abs(), earned_BL.abs().sum(1)
    return earned_BL.float() if bool((apart_B <= 1e-6 * (1.0 + size_B))[known_B].all()) else None  # float32 sums


def learn(
    step: int, collected: Collected, parties: Parties, config: RunConfig, sampler: Sampler | None = None
) -> StepResult:
    """Score what was collected, compare, correct, train on it and publish the result."""
    batch, rewards, trainer = collected.batch, collected.rewards, parties.trainer
    metrics, spans = dict(collected.metrics), list(collected.spans)
    clock = Clock(step, metrics, spans, parties.say)
    with clock("score"):
        batch, old_BL, entropy_BL, sets = scored(trainer, batch)
        metrics |= sets
        ref_BL = trainer.score_reference(batch)
        at_lag = _compare(old_BL, replace(collected, batch=batch), trainer, config)
        metrics |= logged.turn_metrics(old_BL, batch, collected.batch.loss_mask_BL) if "turns/mean" in metrics else {}
        metrics |= logged.mismatch_metrics(at_lag, parties.floor) | logged.staleness_metrics(
            batch, trainer.version, at_lag
        )
        metrics["train/entropy"] = float(entropy_BL[batch.loss_mask_BL].mean())
        values_BL = None if parties.critic is None else parties.critic.values(batch)

    coefficient = 0.0 if parties.kl_penalty is None else parties.kl_penalty.coef
    credit = choice.credit(
        rewards.values_B,
        batch,
        config.algo,
        old_BL=old_BL,
        ref_BL=ref_BL,
        values_BL=values_BL,
        kl_coef=coefficient,
        earned_BL=collected.earned_BL,
    )
    metrics |= credit.metrics
    result = StepResult(
        metrics=metrics,
        version=trainer.version,
        batch=batch,
        old_logprobs_BL=old_BL,
        entropy_BL=entropy_BL,
        advantages_BL=credit.advantages_BL,
        values_BL=credit.values_BL,
        returns_BL=credit.returns_BL,
        rewards=rewards,
        texts=collected.texts,
        spans=spans,
        probe=collected.probe,
    )
    result.warnings.extend(limits.check(result, config, step=step))

    judged = config.mismatch.accept_k3 > 0
    with clock("train"):
        if judged:
            trainer.save_state(_candidate(config))
        rewarded = replace(batch, loss_mask_BL=batch.loss_mask_BL & rewards.known_B[:, None])
        correction = choice.correct(old_BL, rewarded, result.advantages_BL, config.algo, version=result.version)
        metrics |= logged.correction_metrics(correction, old_BL, rewarded)
        whole = TrainBatch(
            rollouts=batch,
            old_logprobs_BL=old_BL,
            advantages_BL=credit.advantages_BL,
            correction=correction,
            num_tokens=0,  # counted for each optimizer step
            num_sequences=0,
            ref_logprobs_BL=ref_BL,
            values_BL=credit.values_BL,
            returns_BL=credit.returns_BL,
        )
        metrics |= update(step, parties, whole, config)
        if parties.kl_penalty is not None and trainer.version > result.version:  # a policy that waits has not moved
            parties.kl_penalty.update(credit.kl, int(rewards.known_B.sum()))

    if trainer.version > result.version:  # otherwise the engine computes with these weights already
        metrics |= _publish(parties, sampler, clock)
        if judged:
            result.warnings.extend(_accept(step, parties, config, metrics, clock))
    return result


def scored(trainer: Trainer, batch: RolloutBatch) -> tuple[RolloutBatch, Tensor, Tensor, dict[str, float]]:
    """(batch, logprobs, entropies, metrics) under the current weights, over the support that the tokens were sampled from.

    Of a truncated spec the batch comes back with its kept sets, which every later pass renormalises over, and without the tokens
    whose set is too large to keep.
    """
    batch.spec.require_repeatable(what="scoring rollouts")
    if not batch.spec.truncated:
        old_BL, entropy_BL = trainer.score(batch)
        return batch, old_BL, entropy_BL, _routes(trainer, batch)
    old_BL, entropy_BL, found = trainer.score_truncated(batch)
    metrics = logged.support_metrics(found, batch) | _routes(trainer, batch)
    left_BL = batch.loss_mask_BL & ~found.too_large_BL
    if not bool(left_BL.any()):
        raise RuntimeError(
            f"every token's kept set has more than {LIMIT} ids ({batch.spec.support}): nothing is left to train on. Sample with a "
            "smaller top_p or a top_k"
        )
    return replace(batch, kept=found.kept, loss_mask_BL=left_BL), old_BL, entropy_BL, metrics


def _routes(trainer: Trainer, batch: RolloutBatch) -> dict[str, float]:
    return {} if batch.routes is None else logged.route_metrics(trainer.routes_taken(), batch)


def _probe(step: int, batch: RolloutBatch, parties: Parties, config: RunConfig) -> RolloutBatch | None:
    """Samples of the current version, where they are due and the batch has older tokens."""
    every, version = config.schedule.probe_every, parties.trainer.version
    if not every or step % every or bool((batch.policy_version_BL[batch.loss_mask_BL] == version).all()):
        return None
    rollouts = sample_probe(step, parties, config)
    return collate(rollouts, pad_token_id=parties.pad_token_id, spec=parties.engine.spec)


def _compare(old_BL: Tensor, collected: Collected, trainer: Trainer, config: RunConfig) -> dict[int, mismatch.Stats]:
    """Old against rollout, by lag. Raises RuntimeError for lags that the schedule cannot have made."""

    def at_lags(batch: RolloutBatch, old_BL: Tensor, allowed: int | None) -> mismatch.Stats:
        lag_BL, rollout_BL = logged.lags_of(batch, trainer.version, allowed=allowed), batch.rollout_logprobs_BL
        return mismatch.collect(old_BL, rollout_BL, batch.loss_mask_BL, lag_B=lag_BL, group_B=batch.group_id_B)

    algo, schedule, probe = config.algo, config.schedule, collected.probe
    synchronous = schedule.mode is ScheduleMode.synchronous
    allowed = None if synchronous else schedule.max_lag * algo.minibatches * algo.epochs
    measured = at_lags(collected.batch, old_BL, allowed)
    if probe is None:
        return logged.by_lag(measured, None)
    probe, probe_BL, *_ = scored(trainer, probe)
    return logged.by_lag(measured, at_lags(probe, probe_BL, 0))


def _accept(step: int, parties: Parties, config: RunConfig, metrics: dict[str, float], clock: Clock) -> list[str]:
    """Keep the update that was just published, or take it back everywhere; says why, and adds to the metrics.

    The gate of a step judges the batch it trains on, sampled before the update; what the update does to the gap would be seen
    one step later. Here a few held-out completions are sampled and scored first: past the limit the policy goes back to what it
    was, bit for bit, optimizer and version included, and the engine gets those weights again. Reference: arXiv 2606.29526.
    """
    with clock("probe"):
        found, refused = _judge(step, parties, config)
    metrics |= found
    if refused is not None:
        parties.trainer.load_state(_candidate(config))
        metrics |= _publish(parties, None, clock)
    ranks.on_first(lambda: shutil.rmtree(_candidate(config), ignore_errors=True))
    return [] if refused is None else [refused]


def _candidate(config: RunConfig) -> Path:
    """Where the policy lies as it was before the update that is being judged."""
    return Path(config.output_dir) / "candidate"


def _judge(step: int, parties: Parties, config: RunConfig) -> tuple[dict[str, float], str | None]:
    """(metrics, why the update is refused or None), with the engine already on the new weights. NaN is refused."""
    prompts = parties.task.eval_prompts()[: config.mismatch.accept_prompts]
    rollouts = parties.sample(prompts, samples=1, seed=step_seed(config, step) + ACCEPT_SEED)
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


def _publish(parties: Parties, sampler: Sampler | None, clock: Clock) -> dict[str, float]:
    if sampler is not None:
        with clock("wait"):
            sampler.before_publish()
    with clock("publish"):
        report = parties.publish(parties.trainer.named_weights(), parties.trainer.version)
    return logged.publish_metrics(report)


def update(step: int, parties: Parties, whole: TrainBatch, config: RunConfig) -> dict[str, float]:
    """One optimizer step per minibatch and epoch, of the critic too where there is one; its first steps are its own.

    Metrics are means over the kept tokens of each minibatch, averaged over the minibatches.
    """
    algo = config.algo
    learners: list[tuple[str, Learner, Callable]] = []
    if parties.critic is not None:
        learners.append(("critic", parties.critic, partial(choice.value_loss, algo=algo)))
    if parties.critic is None or step >= algo.critic.warmup_steps:
        loss_function = partial(choice.policy_loss, algo=algo, max_tokens=config.rollout.max_tokens)
        learners.append(("train", parties.trainer, loss_function))
    size = len(whole.rollouts) // algo.minibatches
    sums: dict[str, float] = {}
    last = {"train/lr": 0.0}  # of a policy that waits for its critic
    for start in [*range(0, len(whole.rollouts), size)] * algo.epochs:
        minibatch = _counted(whole.rows(slice(start, start + size)))
        for room, learner, loss_function in learners:
            for name, value in learner.forward_backward(minibatch, loss_function).items():
                sums[f"{room}/{name}"] = sums.get(f"{room}/{name}", 0.0) + value / (algo.minibatches * algo.epochs)
            last |= {f"{room}/{name}": value for name, value in learner.optim_step().items()}
    return sums | last


def _counted(minibatch: TrainBatch) -> TrainBatch:
    """With the denominators of its own optimizer step. Raises RuntimeError when nothing is left to train on."""
    keep_BL = minibatch.correction.keep
    if not bool(keep_BL.any()):
        raise RuntimeError(
            "the correction rejected every token of a minibatch: nothing is left to train on; loosen its bounds"
        )
    return replace(minibatch, num_tokens=int(keep_BL.sum()), num_sequences=int(keep_BL.any(-1).sum()))


def sample_of(rollout: Rollout, prompt: Prompt, task: Task) -> Sample:
    """What the reward needs to know of a rollout, the verifier's word included."""
    verified = verified_of(rollout, prompt, task)
    return Sample(
        prompt=prompt.text,
        completion=rollout.text,
        verified=math.nan if verified is None else verified,
        unverified=f"the conversation ended without a reward ({': '.join(filter(None, (rollout.outcome, rollout.why)))})"
        if verified is None
        else "",
        group=rollout.group_id,
        tokens=sum(rollout.loss_mask),
    )
