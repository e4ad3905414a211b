"""One step of GRPO, written out: sample, reward, score, compare, correct, train, publish.

The four parties are Protocols, declared here by their consumer; `rlalign.train` puts the real ones together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from rlalign import advantages, corrections, mismatch, objective
from rlalign.config import GateAction, MismatchConfig, RunConfig
from rlalign.mismatch.breakdown import token_lags
from rlalign.reward.mixture import RewardMixture, Rewards, Sample
from rlalign.types import UNKNOWN_VERSION, Correction, LogprobSpec, Rollout, RolloutBatch, TrainBatch, collate

if TYPE_CHECKING:
    from rlalign.weights import PublishReport


class Prompt(Protocol):
    """What the loop reads of a prompt."""

    prompt_id: int
    text: str


class RolloutEngine(Protocol):
    """Samples completions and says under which convention and version."""

    spec: LogprobSpec
    policy_version: int

    def generate(
        self, prompts: Sequence[Sequence[int]], *, prompt_ids: Sequence[int], samples: int, seed: int
    ) -> list[Rollout]: ...


class Trainer(Protocol):
    """Scores and trains the policy."""

    version: int

    def score(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]: ...
    def score_reference(self, batch: RolloutBatch) -> Tensor | None: ...
    def forward_backward(
        self, batch: TrainBatch, loss_function: Callable[[Tensor, TrainBatch], tuple[Tensor, dict[str, float]]]
    ) -> dict[str, float]: ...
    def optim_step(self) -> dict[str, float]: ...
    def named_weights(self) -> Iterable[tuple[str, Tensor]]: ...


class Task(Protocol):
    """Prompts and verifiable rewards."""

    def train_prompts(self, step: int, count: int) -> Sequence[Prompt]: ...
    def eval_prompts(self) -> Sequence[Prompt]: ...
    def reward(self, prompt: Prompt, completion: str) -> float: ...


class Publisher(Protocol):
    """Moves weights to the rollout engine; returns when every rank has proved it computes with them."""

    def __call__(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> PublishReport: ...


@dataclass(frozen=True, kw_only=True)
class Parties:
    """Everyone a step talks to."""

    engine: RolloutEngine
    trainer: Trainer
    task: Task
    publish: Publisher
    encode: Callable[[str], list[int]]
    pad_token_id: int
    reward: Callable[[Sequence[Sample]], Rewards] = field(default_factory=RewardMixture)  # the verifier alone
    floor: Mapping[str, float] | None = None  # the engine's noise floor: name -> nats


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step produced: metrics by their logged names, and the per-token tensors behind them."""

    metrics: dict[str, float]
    version: int  # of the trainer that scored it, before the update
    batch: RolloutBatch
    old_logprobs_BL: Tensor
    entropy_BL: Tensor  # of the trainer's distribution, nats
    advantages_BL: Tensor
    rewards: Rewards  # with every component's raw score; rewards.components["verifier"] holds the labels
    texts: list[str]
    warnings: list[str] = field(default_factory=list)


class MismatchLimitError(RuntimeError):
    """The mismatch passed its limit: training on these ratios would follow an error, not the reward.

    result: the step that showed it, scored and not trained on; None when a rule over several steps stopped the run.
    """

    def __init__(self, message: str, result: StepResult | None = None) -> None:
        super().__init__(message)
        self.result = result


def train_step(step: int, parties: Parties, config: RunConfig) -> StepResult:
    """Run step `step` (from 0). Raises MismatchLimitError before anything was trained when the gate is set to stop."""
    metrics: dict[str, float] = {}
    clock = partial(_timed, metrics)
    began = time.perf_counter()

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
        advantages_B = advantages.group_relative(
            rewards.values_B, batch.group_id_B, normalize_std=config.algo.normalize_std
        )
    metrics |= rewards.metrics()

    with clock("score"):
        old_BL, entropy_BL = parties.trainer.score(batch)
        ref_BL = parties.trainer.score_reference(batch)
        measured = mismatch.compare(old_BL, batch.rollout_logprobs_BL, batch.loss_mask_BL, group_B=batch.group_id_B)
        metrics |= mismatch_metrics(measured, lag_of(batch, parties.trainer.version), parties.floor)
        metrics |= staleness_metrics(batch, parties.trainer.version)
        metrics["train/entropy"] = float(entropy_BL[batch.loss_mask_BL].mean())

    result = StepResult(
        metrics=metrics,
        version=parties.trainer.version,
        batch=batch,
        old_logprobs_BL=old_BL,
        entropy_BL=entropy_BL,
        advantages_BL=advantages_B[:, None].expand_as(old_BL),
        rewards=rewards,
        texts=[r.text for r in rollouts],
    )
    result.warnings.extend(gate(result, measured, config.mismatch, step=step))

    with clock("train"):
        rewarded = replace(batch, loss_mask_BL=batch.loss_mask_BL & rewards.known_B[:, None])
        correction = objective.correct(old_BL, rewarded, result.advantages_BL, config.algo)
        metrics |= correction_metrics(correction, old_BL, rewarded)
        metrics |= update(parties.trainer, result, ref_BL, correction, config)

    with clock("publish"):
        report = parties.publish(parties.trainer.named_weights(), parties.trainer.version)
    metrics |= publish_metrics(report)
    metrics["time/step_s"] = time.perf_counter() - began
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


def rollout_metrics(rollouts: Sequence[Rollout], seconds: float) -> dict[str, float]:
    """Sampled tokens, speed, lengths; a completion cut off by max_tokens counts as truncated."""
    lengths = [sum(r.loss_mask) for r in rollouts]
    return {
        "rollout/tokens": float(sum(lengths)),
        "rollout/tokens_per_s": sum(lengths) / seconds,
        "rollout/length_mean": sum(lengths) / len(lengths),
        "rollout/truncated_frac": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        "rollout/policy_version": float(max(r.policy_version for r in rollouts)),
    }


def sample_of(rollout: Rollout, prompt: Prompt, task: Task) -> Sample:
    """What the reward needs to know of a rollout, the verifier's word included."""
    return Sample(
        prompt=prompt.text,
        completion=rollout.text,
        verified=task.reward(prompt, rollout.text),
        group=rollout.group_id,
        tokens=sum(rollout.loss_mask),
    )


def lag_of(batch: RolloutBatch, version: int) -> int:
    """Versions between the one that sampled this batch and the trainer's. A synchronous step has one lag, normally 0."""
    lags = (version - batch.policy_version_BL[batch.loss_mask_BL]).unique().tolist()
    if len(lags) != 1 or lags[0] < 0:
        raise RuntimeError(
            f"a synchronous step got rollouts {lags} versions behind trainer version {version}; expected one lag, not negative: "
            "the engine was not stamped with what was published"
        )
    return lags[0]


def staleness_metrics(batch: RolloutBatch, version: int) -> dict[str, float]:
    """Versions between the trainer's and the one that sampled a token, and the oldest keys and values it was sampled with.

    The second is left out where the engine does not tell.
    """
    found = {}
    for name, version_BL in (("policy", batch.policy_version_BL), ("kv", batch.kv_version_BL)):
        if name == "kv" and bool((version_BL[batch.loss_mask_BL] == UNKNOWN_VERSION).any()):
            continue
        lag_N = token_lags(version_BL, batch.loss_mask_BL, version=version)[batch.loss_mask_BL].double()
        found |= {f"staleness/{name}/mean": float(lag_N.mean()), f"staleness/{name}/max": float(lag_N.max())}
    return found


def mismatch_metrics(measured: dict[str, float], lag: int, floor: Mapping[str, float] | None) -> dict[str, float]:
    """Under the lag they were measured at: only lag 0 is engine mismatch, and only that has a noise floor to exceed."""
    found = {f"lag{lag}/{name}": value for name, value in measured.items() if name != "nonfinite"}
    if floor is not None and lag == 0:
        found |= mismatch.excess(found, floor)
    return {f"mismatch/{name}": value for name, value in found.items()} | {"mismatch/nonfinite": measured["nonfinite"]}


def correction_metrics(correction: Correction, old_BL: Tensor, batch: RolloutBatch) -> dict[str, float]:
    """What the correction did, apart from the raw metrics: share kept, weights, effective sample size."""
    found = corrections.describe(correction, old_BL, batch.rollout_logprobs_BL, batch.loss_mask_BL)
    return {f"correction/{name}": value for name, value in found.items()} | {
        "correction/kept_frac": 1.0 - found["masked_share"]
    }


def publish_metrics(report: PublishReport) -> dict[str, float]:
    """What was moved, and what had to be repaired on the way."""
    return {f"publish/{name}": float(value) for name, value in asdict(report).items() if name != "ranks"}


@contextmanager
def _timed(metrics: dict[str, float], phase: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    metrics[f"time/{phase}_s"] = time.perf_counter() - began
