"""Monitor: one line a step in somebody else's loop; every mismatch metric and, past a limit, its likely causes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rlalign import mismatch
from rlalign.loops.mirrors import require_same_head
from rlalign.mismatch.causes import Evidence
from rlalign.mismatch.monitor import DEFAULT_RULES, Action, Rule
from rlalign.mismatch.monitor import Monitor as Rules
from rlalign.rollout.attached import AttachedEngine
from rlalign.trainer.live_mirror import Mirror
from rlalign.types import LogprobSpec

__all__ = ["Monitor"]

STOPS = (Action.stop, Action.checkpoint_stop)


class HasLog(Protocol):
    """A run of wandb or trackio, or either module."""

    def log(self, metrics: Mapping[str, float], *, step: int) -> object: ...


class HasScalar(Protocol):
    """TensorBoard's SummaryWriter."""

    def add_scalar(self, name: str, value: float, step: int) -> object: ...


Logger = HasLog | HasScalar | Callable[[dict[str, float], int], object] | None


class Monitor:
    """Compares what sampled with what the trainer recomputed, step by step, and says why where it is past a limit.

    Metrics are `mismatch/...` as in runs of rlalign (docs/metrics.md); limits are `rules`. The last alerts stay in `alerts`.
    """

    def __init__(
        self,
        engine: AttachedEngine | None = None,
        mirror: Mirror | None = None,
        *,
        spec: LogprobSpec | None = None,
        temperature: float | None = None,
        log: Logger = None,
        say: Callable[[str], object] = print,
        rules: Sequence[Rule] = DEFAULT_RULES,
        stop: bool = False,
    ) -> None:
        """engine, mirror: both sides, as `attach` and `mirror` returned them. spec: of the rollout logprobs, `engine.spec(params)`.

        temperature: what the trainer divides its logits by. log: a wandb or trackio run or module, TensorBoard's writer, or a
        function of (metrics, step). say: told each alert. stop: raise where a rule asks to stop; otherwise it is said only.
        Raises RuntimeError for a head on one side only, ValueError for logprobs that are not the sampler's, belong to another
        temperature than the trainer's, or to settings that no trainer repeats: before a step was compared.
        """
        if engine is not None:
            require_same_head(engine, mirror)
        self.engine, self.mirror, self.spec, self.alerts = engine, mirror, spec, []
        self._log, self._say, self._stop = log, say, stop
        self._rules = Rules(rules)
        if spec is not None:
            _require_comparable(spec, temperature)
        self._evidence = {
            "rollout_head": None if engine is None else engine.head_dtype,
            "trainer_head": None if engine is None else "model" if mirror is None else mirror.head_dtype,
            "processed": None if spec is None else spec.processed,
            "rollout_temperature": None if spec is None else spec.temperature,
            "trainer_temperature": temperature,
            "truncated": None if spec is None else spec.truncated,
        }

    def step(
        self,
        step: int,
        old_logprobs_BL: Tensor,
        rollout_logprobs_BL: Tensor,
        mask_BL: Tensor,
        *,
        lag: int | Tensor | None = 0,
        group_B: Tensor | None = None,
        learning_rate: float | None = None,
    ) -> dict[str, float]:
        """Metrics of one step, logged. [B, L] of any float dtype (nats), whole sequences or completions alone.

        old_logprobs_BL: recomputed by the trainer before its update. mask_BL: bool, or 0 and 1. lag: the trainer's version minus
        the one that sampled, one number, [B] or [B, L]; None where nobody knows, and nothing is called engine mismatch then.
        Raises RuntimeError while the engine's weights are in doubt and, with stop=True, when a rule asks to stop; ValueError for
        shapes that differ and masks of other values.
        """
        if self.engine is not None:
            self.engine.require_sound()
        old_BL, rollout_BL = (x.detach().float().cpu() for x in (old_logprobs_BL, rollout_logprobs_BL))
        mask_BL = _as_mask(mask_BL)
        lag_B = None if lag is None else lag.cpu() if isinstance(lag, Tensor) else torch.full((len(old_BL),), lag)
        group_B = None if group_B is None else group_B.cpu()
        found = mismatch.compare(old_BL, rollout_BL, mask_BL, lag_B=lag_B, group_B=group_B, positions=False)
        metrics = {f"mismatch/{name}": value for name, value in found.items()}
        write(self._log, metrics, step)
        evidence = Evidence(**self._evidence, learning_rate=learning_rate)
        self.alerts = [a for a in self._rules.observe(step, metrics, evidence) if not a.unjudged]
        for alert in self.alerts:
            self._say(alert.message())
            if self._stop and alert.action in STOPS:
                raise RuntimeError(alert.message())
        return metrics


def write(log: Logger, metrics: dict[str, float], step: int) -> None:
    """Hand a step's metrics to whatever logger a stack has. Raises ValueError for one that is none."""
    if log is None:
        return
    if hasattr(log, "add_scalar"):
        for name, value in metrics.items():
            log.add_scalar(name, value, step)
    elif hasattr(log, "log"):
        log.log(metrics, step=step)
    elif callable(log):
        log(metrics, step)
    else:
        raise ValueError(
            f"Monitor: {type(log).__name__} logs nothing; give a wandb or trackio run, TensorBoard's SummaryWriter, or a function "
            "of (metrics, step)"
        )


def _require_comparable(spec: LogprobSpec, temperature: float | None) -> None:
    spec.require_repeatable(what="Monitor")
    if not spec.processed and (spec.temperature, spec.top_p, spec.top_k, spec.min_p) != (1.0, 1.0, 0, 0.0):
        raise ValueError(
            f"raw against processed logprobs: the engine returns raw ones, without the temperature {spec.temperature:g} and the "
            "truncation that tokens were sampled with; start it with logprobs_mode=processed_logprobs"
        )
    if temperature is not None and not math.isclose(spec.temperature, temperature, rel_tol=1e-6):
        raise ValueError(
            f"another temperature: tokens are sampled at {spec.temperature:g}, the trainer divides its logits by {temperature:g}; "
            "use one on both sides"
        )
    if spec.truncated:
        raise ValueError(
            f"truncated sampling (top_p={spec.top_p:g}, top_k={spec.top_k}, min_p={spec.min_p:g}): the engine's logprobs are "
            "renormalised over tokens that the trainer does not know; sample without, or score with token_logprobs(kept=...)"
        )


def _as_mask(mask_BL: Tensor) -> Tensor:
    mask_BL = mask_BL.detach().cpu()
    if mask_BL.dtype == torch.bool:
        return mask_BL
    if not bool(((mask_BL == 0) | (mask_BL == 1)).all()):
        raise ValueError(f"Monitor: a mask holds True and False, or 0 and 1; got values such as {mask_BL.max().item()}")
    return mask_BL.bool()
