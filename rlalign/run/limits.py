"""What a run must not exceed: the limits a batch keeps before it is trained on, and the monitor's rules as it goes on."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.config import GateAction, RunConfig, ScheduleMode
from rlalign.mismatch.causes import Evidence, frozen_run_verdict
from rlalign.mismatch.monitor import DEFAULT_RULES, Action, Alert, Monitor, Rule
from rlalign.run.parties import MismatchLimitError, StalenessLimitError, StepRefused, StepResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rlalign.reward.drift_watch import EventLog
    from rlalign.types import LogprobSpec

STOPS = (Action.stop, Action.checkpoint_stop)
PROBED = ("mismatch/lag0/", "mismatch/excess/")  # what only tokens of the current version measure
LEAST_STEPS = 9  # of the self-test at learning rate 0: fewer say nothing about a trend


def check(scored: StepResult, config: RunConfig, *, step: int) -> list[str]:
    """Warnings of a scored step, or its StepRefused, as mismatch.action says. NaN passes no limit.

    mismatch.k3_limit is for tokens at lag 0, schedule.k3_limit for those that older versions sampled.
    """
    warnings = []
    for error in (_mismatch(scored, config, step), _staleness(scored, config, step)):
        if error is None:
            continue
        if config.mismatch.action is GateAction.stop:
            raise error
        warnings.append(str(error))
    return warnings


def _mismatch(scored: StepResult, config: RunConfig, step: int) -> StepRefused | None:
    m, limit = scored.metrics, config.mismatch.k3_limit
    k3 = m.get("mismatch/lag0/k3")
    if k3 is None or k3 <= limit:
        return None
    return MismatchLimitError(
        f"step {step}: mismatch k3 = {k3:.3g} nats/token is over mismatch.k3_limit = {limit:.3g} "
        f"(mean |log_ratio| {m['mismatch/lag0/abs_mean']:.3g}, max {m['mismatch/lag0/abs_max']:.3g}, "
        f"{m['mismatch/nonfinite']:.0f} not finite). "
        "Usual causes: a head in another dtype on one side, weights that did not arrive, another temperature or tokenizer. "
        "`rlalign parity` on this checkpoint tells the first from the rest.",
        scored,
    )


def _staleness(scored: StepResult, config: RunConfig, step: int) -> StepRefused | None:
    m, limit = scored.metrics, config.schedule.k3_limit
    k3 = m.get("staleness/k3")
    if k3 is None or k3 <= limit:
        return None
    return StalenessLimitError(
        f"step {step}: staleness k3 = {k3:.3g} nats/token is over schedule.k3_limit = {limit:.3g} (tokens up to "
        f"{m['staleness/policy/max']:.0f} versions old, {m['mismatch/nonfinite']:.0f} not finite): the policy moved that far "
        "between sampling and training, engine mismatch included. Lower algo.lr or schedule.max_lag, or use "
        "schedule.mode=synchronous",
        scored,
    )


class Watch:
    """Feeds each step's metrics to the monitor and does what its alerts ask for."""

    def __init__(
        self,
        config: RunConfig,
        *,
        spec: LogprobSpec,
        trainer_head: str,
        floor: Mapping[str, float] | None,
        log: EventLog,
        say: Callable[[str], None],
        checkpoint: Callable[[Path], None],
    ) -> None:
        """checkpoint: saves the policy into a folder, for the action checkpoint+stop. floor: from `rlalign parity`."""
        self._monitor = Monitor(rules_of(config))
        self._log, self._say, self._checkpoint = log, say, checkpoint
        self._folder = Path(config.output_dir) / "checkpoint-alert"
        self._evidence = {
            "rollout_head": spec.head_dtype,
            "trainer_head": trainer_head,
            "processed": spec.processed,
            "rollout_temperature": spec.temperature,
            "trainer_temperature": config.rollout.temperature,
            "truncated": spec.truncated,
            "replayed": spec.truncated,  # `step.scored` renormalises over the kept sets
            "floor_k3": None if floor is None else floor["k3"],
        }

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises MismatchLimitError when a rule asks to stop, after a checkpoint where it asks for one."""
        evidence = Evidence(
            **self._evidence, learning_rate=metrics["train/lr"], publish_verified=True, prefix_cache_reset=True
        )
        for alert in self._monitor.observe(step, metrics, evidence):
            self._act(alert)

    def _act(self, alert: Alert) -> None:
        message = alert.message()
        self._log.event(f"alert/{alert.action}", message)
        if alert.action is not Action.log:
            self._say(message)
        if alert.action is Action.checkpoint_stop:
            self._checkpoint(self._folder)
            raise MismatchLimitError(f"{message}\nThe policy before the stop is in {self._folder}")
        if alert.action is Action.stop:
            raise MismatchLimitError(message)


def rules_of(config: RunConfig) -> tuple[Rule, ...]:
    """The configured rules; without any, the monitor's defaults at the run's own k3 limit and no harsher than its gate.

    Asynchronous steps measure the engine mismatch only where they probe it; its rules then judge a window of probes.
    """
    given = [asdict(rule) for rule in config.mismatch.rules]
    rules = [Rule(**rule | {"action": Action(rule["action"])}) for rule in given]
    if not rules:
        limit = config.mismatch.k3_limit
        own = {"mismatch/lag0/k3": {"limit": limit, "release": limit / 2}}
        rules = [replace(rule, **own.get(rule.metric, {})) for rule in DEFAULT_RULES]
        if config.mismatch.action is GateAction.warn:
            rules = [replace(r, action=Action.warn) if r.action in STOPS else r for r in rules]
    every = 1 if config.schedule.mode is ScheduleMode.synchronous else max(1, config.schedule.probe_every)
    return tuple(replace(rule, every=every) if rule.metric.startswith(PROBED) else rule for rule in rules)


def self_test(rows: Sequence[Mapping[str, float]], learning_rate: float) -> dict[str, object] | None:
    """At learning rate 0 nothing may move: the verdict over the run's lag-0 k3, or None for a run that trained.

    Raises RuntimeError when k3 drifted: weights cannot have changed, so what changed is what publishing did to them.
    """
    history = [row["mismatch/lag0/k3"] for row in rows if "mismatch/lag0/k3" in row]
    if learning_rate > 0:
        return None
    if len(history) < LEAST_STEPS:
        return {"flat": None, "steps": len(history), "reason": f"needs {LEAST_STEPS} steps"}
    cause = frozen_run_verdict(history)
    if cause is not None:
        raise RuntimeError(f"self-test at learning rate 0 failed: {cause.name}: {cause.why}. Confirm: {cause.command}")
    return {"flat": True, "steps": len(history)}
