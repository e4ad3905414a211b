"""What PPO adds to the objective: advantages per token, the critic they come from, and the price of leaving the initial policy."""

from __future__ import annotations

from dataclasses import dataclass

from rlalign.config.checks import positive, require

ESTIMATORS = ("k1", "k2", "k3")


@dataclass(kw_only=True)
class GaeConfig:
    """Generalised advantage estimation, arXiv 1506.02438."""

    gamma: float = 1.0  # discount of a token's future
    lam: float = 0.95  # 0: trust the critic's next value; 1: trust what the sequence earned
    whiten: bool = True  # advantages with mean 0 and variance 1 over the step's tokens

    def __post_init__(self) -> None:
        for name, value in (("gamma", self.gamma), ("lam", self.lam)):
            require(0 <= value <= 1, f"algo.gae.{name}={value}: must lie in [0, 1]")


@dataclass(kw_only=True)
class CriticConfig:
    """The critic: its own copy of a model's body with one number a token, in its own DeepSpeed engine (trainer.* holds for it)."""

    path: str = ""  # Hugging Face folder it starts from, a reward model's with its score head; empty: the policy's body
    lr: float = 1e-5
    warmup_steps: int = 0  # first steps of the run, which train the critic alone
    clip: float = 0.2  # a value moves at most so far in a step, in units of the reward; inf: no clip

    def __post_init__(self) -> None:
        positive(self, "algo.critic", "clip")
        require(
            self.lr >= 0 and self.warmup_steps >= 0, "algo.critic.lr and algo.critic.warmup_steps cannot be negative"
        )


@dataclass(kw_only=True)
class KlPenaltyConfig:
    """KL(policy || initial policy), taken off the reward of every token."""

    coef: float = 0.0  # reward per nat; 0: no penalty, and no reference model is kept
    estimator: str = "k1"  # k1 | k2 | k3 of each sampled token
    target: float = 0.0  # nats per sequence that coef is steered to; 0: coef stays, arXiv 1909.08593
    horizon: int = 10_000  # sequences in which coef changes by a fifth, at most

    def __post_init__(self) -> None:
        positive(self, "algo.kl_penalty", "horizon")
        require(
            self.estimator in ESTIMATORS,
            f"algo.kl_penalty.estimator={self.estimator!r}: choose one of {', '.join(ESTIMATORS)}",
        )
        require(
            self.coef >= 0 and self.target >= 0, "algo.kl_penalty.coef and algo.kl_penalty.target cannot be negative"
        )
        require(
            self.target == 0 or self.coef > 0,
            f"algo.kl_penalty.target={self.target} with coef=0: steering multiplies coef, and 0 stays 0; set where it starts",
        )
