"""The objective: loss, advantages and what corrects the mismatch."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlalign.config.sections import not_negative, one_of, positive, require

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
        not_negative(self, "algo.critic", "lr", "warmup_steps")


@dataclass(kw_only=True)
class KlPenaltyConfig:
    """KL(policy || initial policy), taken off the reward of every token."""

    coef: float = 0.0  # reward per nat; 0: no penalty, and no reference model is kept
    estimator: str = "k1"  # k1 | k2 | k3 of each sampled token
    target: float = 0.0  # nats per sequence that coef is steered to; 0: coef stays, arXiv 1909.08593
    horizon: int = 10_000  # sequences in which coef changes by a fifth, at most

    def __post_init__(self) -> None:
        positive(self, "algo.kl_penalty", "horizon")
        one_of(self, "algo.kl_penalty", "estimator", ESTIMATORS)
        not_negative(self, "algo.kl_penalty", "coef", "target")
        require(
            self.target == 0 or self.coef > 0,
            f"algo.kl_penalty.target={self.target} with coef=0: steering multiplies coef, and 0 stays 0; set where it starts",
        )


PRESETS = {  # of rlalign.objective.presets, by their names there, and the numbers each of them takes
    "tis": ("high",),
    "ess_tis": ("threshold",),
    "icepop": ("low", "high"),
    "kpop": ("threshold",),
    "mis": ("high",),
    "seq_tis": ("high",),
    "geo_mask": ("low", "high"),
    "veto": ("low",),
    "opsm": (),
    "dppo_tv": ("low", "high"),
    "m2po": ("threshold",),
    "m2po_all": ("threshold",),
}


LOSSES = ("grpo", "grpo_sequence", "dr_grpo", "dapo", "gspo", "cispo", "ppo")
KL_GRADIENTS = ("k3", "unbiased")
WITH_REFERENCE = ("grpo", "grpo_sequence", "dr_grpo", "ppo")  # have a KL term of their own


@dataclass(kw_only=True)
class CorrectionConfig:
    """A preset by name, or a level and a mode; see rlalign.objective.presets and rlalign.objective.corrections.correct. Off:
    weights of one."""

    # tis | ess_tis | icepop | kpop | mis | seq_tis | geo_mask | veto | opsm | dppo_tv | m2po | m2po_all
    preset: str = ""
    level: str = ""  # token | sequence | geometric | segment
    mode: str = ""  # truncate | clip | mask
    low: float | None = None  # bounds on the ratio old / rollout; a preset's own where not given
    high: float | None = None
    threshold: float | None = None  # kpop: binary KL, nats; ess_tis: effective sample size, 0 to 1; m2po: mean of d^2
    veto: float | None = None  # with level and mode: a token ratio under this rejects its sequence
    normalize: bool = False  # with level and mode: weights divided by their mean over the batch
    # tokens of the current version keep weight 1 exactly: no variance from engine mismatch, but its bias
    on_policy_one: bool = False

    @property
    def off(self) -> bool:
        """True when nothing was asked for."""
        return not (self.preset or self.level or self.mode)

    def __post_init__(self) -> None:
        require(
            bool(self.level) == bool(self.mode) and not (self.preset and self.level),
            f"algo.correction: give either a preset or both level and mode, got preset={self.preset!r}, "
            f"level={self.level!r}, mode={self.mode!r}",
        )
        require(
            not self.off
            or (
                (self.low, self.high, self.threshold, self.veto) == (None,) * 4
                and not (self.normalize or self.on_policy_one)
            ),
            "algo.correction: bounds are set, but neither a preset nor level and mode",
        )
        require(
            not self.level or self.threshold is None,
            "algo.correction.threshold goes with the presets kpop, ess_tis, m2po and m2po_all; level and mode take low and high",
        )
        if self.preset:
            one_of(self, "algo.correction", "preset", PRESETS)
            require(
                self.veto is None and not self.normalize,
                "algo.correction: veto and normalize go with level and mode; presets are fixed recipes",
            )
            for name in ("low", "high", "threshold"):
                require(
                    getattr(self, name) is None or name in PRESETS[self.preset],
                    f"algo.correction.{name}: the preset {self.preset} has no such bound "
                    f"(it takes {', '.join(PRESETS[self.preset]) or 'none'})",
                )


@dataclass(kw_only=True)
class AlgoConfig:
    loss: str = "grpo"  # grpo | grpo_sequence | dr_grpo | dapo | gspo | cispo | ppo
    lr: float = 1e-6
    warmup_steps: int = 0  # linear, optimizer steps
    epochs: int = 1  # times one batch of rollouts is trained on
    minibatches: int = 1  # optimizer steps of an epoch
    clip_low: float | None = None  # the loss's own default where not given
    clip_high: float | None = None
    kl_coef: float = 0.0  # k3 to the initial policy in the loss; 0: no reference model is kept
    kl_gradient: str = "k3"  # k3 (GRPO's own, biased) | unbiased (of the KL itself)
    advantage: str = "group"  # group (GRPO) | gae (PPO, with a critic)
    normalize_std: bool = True  # group: divide advantages by the group's standard deviation (False: Dr. GRPO)
    gae: GaeConfig = field(default_factory=GaeConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    kl_penalty: KlPenaltyConfig = field(default_factory=KlPenaltyConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)

    @property
    def needs_reference(self) -> bool:
        """True when the initial policy must score every batch."""
        return self.kl_coef > 0 or self.kl_penalty.coef > 0

    def __post_init__(self) -> None:
        positive(self, "algo", "epochs", "minibatches")
        one_of(self, "algo", "loss", LOSSES)
        require(self.lr >= 0, f"algo.lr={self.lr}: cannot be negative (0 is the weight-sync self-test)")
        not_negative(self, "algo", "kl_coef", "warmup_steps")
        require(
            self.kl_coef == 0 or self.loss in WITH_REFERENCE,
            f"algo.kl_coef={self.kl_coef}: algo.loss={self.loss} has no reference term",
        )
        one_of(self, "algo", "kl_gradient", KL_GRADIENTS)
        self._check_advantage()

    def _check_advantage(self) -> None:
        one_of(self, "algo", "advantage", ("group", "gae"))
        require(
            self.kl_coef == 0 or self.kl_penalty.coef == 0,
            f"algo.kl_coef={self.kl_coef} and algo.kl_penalty.coef={self.kl_penalty.coef}: the policy would pay twice for "
            "leaving the initial one; keep the term of the loss or the penalty on the reward",
        )
        unused = [
            name
            for name, kind in (("gae", GaeConfig), ("critic", CriticConfig), ("kl_penalty", KlPenaltyConfig))
            if self.advantage == "group" and getattr(self, name) != kind()
        ]
        require(
            not unused,
            f"algo.{', algo.'.join(unused)}: set, but algo.advantage=group has neither a critic nor rewards per token; "
            "set algo.advantage=gae (or algo.kl_coef for a KL term in the loss)",
        )
