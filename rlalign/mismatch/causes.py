"""From evidence to causes: why the two engines may disagree, most likely first, with the command that would confirm it.

A cause's score is 1 where the run itself proves it (two head dtypes), below 1 where the metrics only look like it. What a growing
mismatch follows (`follows`) is no cause: it says where to look first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

__all__ = ["Cause", "Drift", "Evidence", "Followed", "drift", "follows", "frozen_run_verdict", "likely_causes"]


@dataclass(frozen=True)
class Cause:
    """name: short. why: the evidence, with its numbers. command: what to run. score: in (0, 1], the order."""

    name: str
    why: str
    command: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a run knows of its own set-up; None where nothing was recorded.

    rollout_head, trainer_head: head dtypes. processed: the engine's logprobs carry temperature and truncation.
    truncated: top-p, top-k or min-p in the sampling. replayed: the trainer renormalises over the same kept sets.
    prefix_cache_reset: done with the last publish. publish_verified: fingerprints matched on every rank.
    retokenized: sequences whose text encodes to other ids.
    k3_by_rank: engine rank -> k3. floor_k3: the noise floor's k3. learning_rate: of the last step.
    """

    rollout_head: str | None = None
    trainer_head: str | None = None
    processed: bool | None = None
    rollout_temperature: float | None = None
    trainer_temperature: float | None = None
    truncated: bool | None = None
    replayed: bool | None = None
    prefix_cache_reset: bool | None = None
    publish_verified: bool | None = None
    retokenized: int | None = None
    k3_by_rank: Mapping[int, float] | None = None
    floor_k3: float | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class Drift:
    """Trend of a metric over steps: the ratio of its late to its early median, and Mann-Kendall's z of a rise."""

    ratio: float
    z: float

    @property
    def rising(self) -> bool:
        """A rise of over 20 % that chance gives less than once in a thousand runs."""
        return self.ratio > 1.2 and self.z > 3.1


def drift(values: Sequence[float]) -> Drift:
    """Trend of `values`, one per step; at least 9 finite ones or ValueError. Reference: Mann 1945, Kendall 1975."""
    finite = [v for v in values if math.isfinite(v)]
    n = len(finite)
    if n < 9:
        raise ValueError(f"drift needs at least 9 finite values, got {n}")
    third = n // 3
    early, late = median(finite[:third]), median(finite[-third:])
    score = sum((b > a) - (b < a) for i, a in enumerate(finite) for b in finite[i + 1 :])
    spread = math.sqrt(n * (n - 1) * (2 * n + 5) / 18.0)
    return Drift(
        ratio=late / early if early > 0.0 else math.inf if late > 0.0 else 1.0, z=(score - (score > 0)) / spread
    )


def frozen_run_verdict(k3_history: Sequence[float]) -> Cause | None:
    """The self-test at learning rate 0: mismatch must stay flat; None when it does, weight sync as suspect when not."""
    trend = drift(k3_history)
    if not trend.rising:
        return None
    return Cause(
        "weight sync",
        f"k3 grew {trend.ratio:.3g}-fold (z = {trend.z:.1f}) at learning rate 0: the policy did not move, so "
        "publishing changed what the engine computes",
        "rlalign doctor",
        1.0,
    )


_RECENT = 200  # steps that Mann-Kendall's quadratic sum reads


def likely_causes(
    metrics: Mapping[str, float], evidence: Evidence, *, k3_history: Sequence[float] = ()
) -> tuple[Cause, ...]:
    """Causes with any support, highest score first. `metrics` uses logged keys (mismatch/lag0/...).

    Never empty: with no sign of a fault, plain numerical difference is named, and how to measure its floor.
    """
    found = [
        _head(evidence),
        _semantics(evidence),
        _temperature(metrics, evidence),
        _truncation(metrics, evidence),
        _stale_weights(evidence, k3_history[-_RECENT:]),
        _prefix_cache(metrics, evidence),
        _tokenisation(metrics, evidence),
        _one_rank(evidence),
        _numerics(metrics, evidence),
    ]
    return tuple(sorted((c for c in found if c is not None), key=lambda c: -c.score))


def _lag0(metrics: Mapping[str, float], name: str) -> float:
    """A lag-0 metric, or NaN, with which every comparison below is False."""
    return metrics.get(f"mismatch/lag0/{name}", math.nan)


def _head(evidence: Evidence) -> Cause | None:
    rollout, trainer = evidence.rollout_head, evidence.trainer_head
    if rollout is None or trainer is None or rollout == trainer:
        return None
    why = f"the rollout head computes in {rollout}, the trainer's in {trainer}"
    return Cause("one-sided head", why, "rlalign parity", 1.0)


def _semantics(evidence: Evidence) -> Cause | None:
    if evidence.processed is not False:
        return None
    shaped = evidence.truncated or (evidence.rollout_temperature or 1.0) != 1.0
    why = "the engine returns raw logprobs" + (", while sampling is shaped" if shaped else "")
    return Cause("raw against processed logprobs", why, "rlalign doctor", 1.0 if shaped else 0.3)


def _temperature(metrics: Mapping[str, float], evidence: Evidence) -> Cause | None:
    rollout, trainer = evidence.rollout_temperature, evidence.trainer_temperature
    if rollout is not None and trainer is not None:
        if rollout == trainer:
            return None
        why = f"sampled at {rollout:g}, scored at {trainer:g}"
        return Cause("temperature", why, "rlalign doctor", 1.0)
    if _lag0(metrics, "p50") > 0.05 and _lag0(metrics, "pearson_prob") > 0.95:
        why = f"half of all tokens differ by over {_lag0(metrics, 'p50'):.2g} nats, yet probabilities correlate"
        return Cause("temperature", why, "rlalign doctor", 0.5)
    return None


def _truncation(metrics: Mapping[str, float], evidence: Evidence) -> Cause | None:
    if evidence.truncated is False:
        return None
    if evidence.replayed:
        return _sets_differ(metrics)
    highest, k1 = _lag0(metrics, "log_ratio_max"), _lag0(metrics, "k1")
    one_sided = k1 > 0.01 and highest < 0.1 * k1
    if evidence.truncated and evidence.processed is not False:
        why = "sampling renormalises over top-p, top-k or min-p; the trainer scores the whole vocabulary"
        if k1 > 0.0:  # k1 is then minus the mean log of the kept mass, whatever else there is
            why += f" (k1 {k1:.3g} is what a kept mass of {math.exp(-k1):.3g} costs)"
        return Cause("truncation", why, "rlalign doctor", 1.0 if one_sided else 0.9)
    if one_sided:
        why = f"the trainer is never above the engine (largest log-ratio {highest:.2g}, k1 {k1:.2g})"
        return Cause("truncation", why, "rlalign doctor", 0.7)
    return None


def _sets_differ(metrics: Mapping[str, float]) -> Cause | None:
    """Kept sets are shared; they are a cause only where the trainer's own are other ones for many tokens."""
    outside, differ = (metrics.get(f"support/{name}", 0.0) for name in ("outside", "differ"))
    if max(outside, differ) < 0.01:
        return None
    why = (
        f"{outside:.2%} of tokens lie outside the trainer's own kept set, {differ:.2%} of captured sets are not its own"
    )
    return Cause("kept sets differ", why, "rlalign parity", 0.5)


def _stale_weights(evidence: Evidence, k3_history: Sequence[float]) -> Cause | None:
    if evidence.publish_verified is False:
        return Cause("stale weights", "the last publish was not verified on every rank", "rlalign doctor", 1.0)
    if sum(math.isfinite(v) for v in k3_history) < 9:
        return None
    trend = drift(k3_history)
    if not trend.rising:
        return None
    if evidence.learning_rate == 0.0:
        return frozen_run_verdict(k3_history)
    why = f"lag-0 k3 grew {trend.ratio:.3g}-fold over the run (z = {trend.z:.1f}): part of the weights may not arrive"
    return Cause("stale weights", why, "rlalign train algo.lr=0 (mismatch must stay flat)", 0.6)


def _prefix_cache(metrics: Mapping[str, float], evidence: Evidence) -> Cause | None:
    if evidence.prefix_cache_reset is False:
        why = "the prefix cache was not reset with the last publish: keys and values of older weights are attended"
        return Cause("prefix cache after sync", why, "rlalign doctor", 0.95)
    if evidence.prefix_cache_reset:
        return None
    first, last = (_lag0(metrics, f"position{d}/k3") for d in (0, 9))
    if first > 3.0 * last:
        why = f"k3 is {first:.2g} in the first tenth of the answers and {last:.2g} in the last"
        return Cause("prefix cache after sync", why, "rlalign parity --noise-floor", 0.4)
    return None


def _tokenisation(metrics: Mapping[str, float], evidence: Evidence) -> Cause | None:
    if evidence.retokenized:
        why = f"{evidence.retokenized} sequences encode to other token ids than were sampled"
        return Cause("tokenisation round trip", why, "rlalign doctor", 1.0)
    if evidence.retokenized == 0:
        return None
    p50, over, worst = _lag0(metrics, "p50"), _lag0(metrics, "over_1"), _lag0(metrics, "abs_max")
    if p50 < 0.02 and 0.0 < over < 0.02 and worst > 3.0:
        why = f"{over:.2%} of tokens are off by over 1 nat (worst {worst:.1f}) while half are within {p50:.2g}"
        return Cause("tokenisation round trip", why, "rlalign mismatch on the step's token file", 0.5)
    return None


def _one_rank(evidence: Evidence) -> Cause | None:
    if evidence.k3_by_rank is None or len(evidence.k3_by_rank) < 2:
        return None
    worst = max(evidence.k3_by_rank, key=evidence.k3_by_rank.__getitem__)
    rest = median(v for rank, v in evidence.k3_by_rank.items() if rank != worst)
    if not evidence.k3_by_rank[worst] > 4.0 * rest:
        return None
    why = f"rank {worst} has k3 {evidence.k3_by_rank[worst]:.2g}, the others {rest:.2g}"
    return Cause("one engine rank differs", why, "rlalign doctor", 0.9)


def _numerics(metrics: Mapping[str, float], evidence: Evidence) -> Cause:
    k3, floor = _lag0(metrics, "k3"), evidence.floor_k3
    if floor is None:
        why = "kernels, batching and precision differ; without a measured floor this cannot be told from a fault"
        return Cause("numerical difference", why, "rlalign parity --noise-floor", 0.2)
    if k3 <= 2.0 * floor:
        why = f"k3 {k3:.2g} is within twice the engine's own noise floor {floor:.2g}"
        return Cause("noise floor", why, "rlalign parity --noise-floor", 0.8)
    why = (
        f"k3 {k3:.2g} is {k3 / floor:.3g} times the noise floor {floor:.2g}"
        if floor > 0.0
        else "the floor is exactly 0"
    )
    return Cause("numerical difference", why, "rlalign parity", 0.1)


LEADS, ROWS = 5, 12  # rows that a series may run ahead; fewest rows that a correlation is taken over
DRAWS, TINY = 200, 1e-18


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """One series against k3. levels, changes: Spearman's correlations, -1 to 1; lead: rows it runs ahead, where that of the changes
    is largest. chance: 95 % quantile of the largest |changes| over all series and leads with the changes, or the rows, of k3 in
    random order, whichever is larger.
    """

    name: str
    levels: float
    changes: float
    lead: int
    chance: float

    @property
    def beyond_chance(self) -> bool:
        """The changes go together more than the luckiest of unrelated ones would."""
        return abs(self.changes) > self.chance


def follows(k3: Sequence[float], series: Mapping[str, Sequence[float]], *, seed: int = 0) -> list[Followed]:
    """Rank correlations of k3 with what else changes in a run, the strongest first; empty below ROWS rows.

    Two series that both grow correlate whatever they are, so the verdict is over the changes from row to row, at the lead that fits
    best, against what the largest of as many correlations reaches by chance.

    The k3, nats, is taken by its logarithm (from TINY on), since it grows by factors.
    Raises ValueError for series of other lengths and for numbers that are not finite.
    """
    wanted = torch.tensor(list(k3), dtype=torch.float64)
    given = {name: torch.tensor(list(values), dtype=torch.float64) for name, values in series.items()}
    for name, values in ({"k3": wanted} | given).items():
        if len(values) != len(wanted) or not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"follows: {name} has {len(values)} rows, all of them must be finite; k3 has {len(wanted)}"
            )
    wanted = wanted.clamp(min=TINY).log()
    given = {name: values for name, values in given.items() if float(values.std()) > 0} if len(wanted) >= ROWS else {}
    if not given or float(wanted.std()) == 0:
        return []
    steps_KT = torch.stack([values.diff() for values in given.values()])
    at_LK = _leads(steps_KT, wanted.diff()[None])[..., 0]
    lead_K = at_LK.abs().argmax(0)
    best_K = at_LK.gather(0, lead_K[None])[0]
    draws = torch.Generator().manual_seed(seed)
    orders_DT, orders_DR = (
        torch.rand(DRAWS, n, generator=draws, dtype=torch.float64) for n in (len(wanted) - 1, len(wanted))
    )
    chance = max(  # of changes in random order, and of the changes of rows in random order: what walks and what noise would reach
        float(_leads(steps_KT, shuffled_DT).abs().amax((0, 1)).quantile(0.95))
        for shuffled_DT in (orders_DT, wanted[orders_DR.argsort(1)].diff(dim=1))
    )
    found = [
        Followed(
            name=name, levels=float(_spearman(values[None, : len(values) - lead], wanted[lead:][None])[0, 0]), changes=float(best),
            lead=lead, chance=chance,
        )
        for (name, values), best, lead in zip(given.items(), best_K, lead_K.tolist(), strict=True)
    ]  # fmt: skip
    return sorted(found, key=lambda f: -abs(f.changes))


def _leads(steps_KT: Tensor, wanted_DT: Tensor) -> Tensor:
    """[LEADS + 1, K, D]: correlations with the steps that run so many rows ahead."""
    count = wanted_DT.shape[1]
    return torch.stack([_spearman(steps_KT[:, : count - lead], wanted_DT[:, lead:]) for lead in range(LEADS + 1)])


def _spearman(values_KT: Tensor, wanted_DT: Tensor) -> Tensor:
    """[K, D]: Pearson's correlation of the ranks; 0 for a series without changes."""
    one_KT, other_DT = (ranks - ranks.mean(1, keepdim=True) for ranks in (_ranks(values_KT), _ranks(wanted_DT)))
    scale_KD = one_KT.norm(dim=1)[:, None] * other_DT.norm(dim=1)
    return torch.where(scale_KD > 0, one_KT @ other_DT.T / scale_KD, 0.0)


def _ranks(values_KT: Tensor) -> Tensor:
    """Ranks from 0, those of equal values averaged."""
    ordered_KT, given_KT = values_KT.sort(1).values.contiguous(), values_KT.contiguous()
    below_KT, upto_KT = (torch.searchsorted(ordered_KT, given_KT, right=right) for right in (False, True))
    return (below_KT + upto_KT - 1).double() / 2
