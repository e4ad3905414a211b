"""The two limits a scored batch must keep before it is trained on: of engine mismatch and of staleness, never mixed up."""

from __future__ import annotations

from rlalign.config import GateAction, RunConfig
from rlalign.parties import MismatchLimitError, StalenessLimitError, StepRefused, StepResult


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
