"""Who takes part in a step, as the loop sees them, and what passes between its halves; `rlalign.run.train` puts them together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from rlalign.reward.mixture import RewardMixture, Rewards, Sample
from rlalign.types import LogprobSpec, Rollout, RolloutBatch, TrainBatch

if TYPE_CHECKING:
    from rlalign.logprobs.truncation import Found
    from rlalign.objective.reference_kl import KlController
    from rlalign.tasks import Prompt, Task
    from rlalign.tracking.timeline import Span
    from rlalign.weights import PublishReport


class RolloutEngine(Protocol):
    """Samples completions and says under which convention and version."""

    spec: LogprobSpec
    policy_version: int

    def generate(
        self, prompts: Sequence[Sequence[int]], *, prompt_ids: Sequence[int], samples: int, seed: int
    ) -> list[Rollout]: ...


class Learner(Protocol):
    """Follows a loss."""

    def forward_backward(
        self, batch: TrainBatch, loss_function: Callable[[Tensor, TrainBatch], tuple[Tensor, dict[str, float]]]
    ) -> dict[str, float]: ...
    def optim_step(self) -> dict[str, float]: ...


class Trainer(Learner, Protocol):
    """Scores and trains the policy."""

    version: int

    def score(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]: ...
    def score_truncated(self, batch: RolloutBatch) -> tuple[Tensor, Tensor, Found]: ...
    def routes_taken(self) -> Mapping[str, float]: ...
    def score_reference(self, batch: RolloutBatch) -> Tensor | None: ...
    def named_weights(self) -> Iterable[tuple[str, Tensor]]: ...
    def save_state(self, folder: Path) -> None: ...
    def load_state(self, folder: Path) -> None: ...


class Critic(Learner, Protocol):
    """Tells what a sequence will still earn, and learns it."""

    def values(self, batch: RolloutBatch) -> Tensor: ...


def verified_of(rollout: Rollout, prompt: Prompt, task: Task) -> float | None:
    """The verifier's word on a completion; a conversation's is its environment's, None where that failed or gave none."""
    return rollout.verified if rollout.outcome else task.reward(prompt, rollout.text)


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
    critic: Critic | None = None  # with algo.advantage=gae
    kl_penalty: KlController | None = None  # with algo.kl_penalty
    say: Callable[[int, str], None] = lambda step, phase: None  # told each phase of a step as it begins

    def sample(self, prompts: Sequence[Prompt], *, samples: int, seed: int) -> list[Rollout]:
        """So many completions of each prompt, from the engine as it is now."""
        return self.engine.generate(
            [self.encode(p.text) for p in prompts],
            prompt_ids=[p.prompt_id for p in prompts],
            samples=samples,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One step's samples with their rewards, not yet seen by the trainer."""

    batch: RolloutBatch
    rewards: Rewards  # with every component's raw score; rewards.components["verifier"] holds the labels
    texts: list[str]
    metrics: dict[str, float]  # of sampling and rewarding
    spans: list[Span] = field(default_factory=list)  # when that was
    earned_BL: Tensor | None = None  # of conversations: what of the reward each turn's last token earned
    probe: RolloutBatch | None = None  # samples at lag 0 to measure the engine mismatch on, no part of the batch


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step produced: metrics by their logged names, and the per-token tensors behind them."""

    metrics: dict[str, float]
    version: int  # of the trainer that scored it, before the update
    batch: RolloutBatch
    old_logprobs_BL: Tensor
    entropy_BL: Tensor  # of the trainer's distribution, nats
    advantages_BL: Tensor
    values_BL: Tensor | None = None  # the critic's, before the update
    returns_BL: Tensor | None = None  # what it is taught
    rewards: Rewards  # with every component's raw score; rewards.components["verifier"] holds the labels
    texts: list[str]
    warnings: list[str] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)  # when each phase ran
    probe: RolloutBatch | None = None


class StepRefused(RuntimeError):
    """A limit stopped the run.

    result: the step that showed it, scored and not trained on; None when a rule over several steps stopped the run.
    """

    def __init__(self, message: str, result: StepResult | None = None) -> None:
        super().__init__(message)
        self.result = result


class MismatchLimitError(StepRefused):
    """The engine mismatch passed its limit: training on these ratios would follow an error, not the reward."""


class StalenessLimitError(StepRefused):
    """The policy moved further between sampling and training than the schedule's limit: the tokens are too old."""
