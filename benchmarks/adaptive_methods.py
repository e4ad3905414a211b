"""The calibrations that benchmarks/adaptive.py compares, each from fitted tokens to a probability per judged token.

Confidence methods (Platt, isotonic, histogram binning) see the top token's probability alone and give another one.
Distribution methods (temperature, vector scaling, ATS) give a whole distribution, so also a probability of the target.

N scored tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from adaptive_data import Part
from torch import Tensor

from rlalign.calibration.adaptive import AdaptiveTemperature, Objective, Training, confidence_at
from rlalign.calibration.adaptive.batches import Level
from rlalign.calibration.adaptive.heads import Kind
from rlalign.calibration.calibrators import CalibrationWarning, IsotonicCalibrator, PlattCalibrator

BINS = 15
SMALLEST = 1e-7


@dataclass(frozen=True, kw_only=True)
class Judged:
    """top_N: probability of the method's top token; right_N: whether that is the reference's; target_N: probability of
    the reference's token, None for confidence methods."""

    top_N: np.ndarray
    right_N: np.ndarray
    target_N: np.ndarray | None


Method = Callable[[Part], Judged]


def uncalibrated(fit: Part, validation: Part) -> Method:
    """T = 1."""
    return lambda part: at_temperature(part, 1.0)


def temperature(loss: str) -> Callable[[Part, Part], Method]:
    """One T for all tokens, by `cross_entropy` (Guo et al.) or by `top_label`, the loss of our ATS; both parts fitted."""

    def fit_one(fit: Part, validation: Part) -> Method:
        grid = torch.logspace(-1, 1.5, 251)
        logits_NV, labels_N = table(fit, validation)
        right_N = logits_NV.argmax(1) == labels_N
        losses = []
        for t in grid:
            logp_NV = (logits_NV / t).log_softmax(1)
            if loss == "cross_entropy":
                losses.append(-logp_NV.gather(1, labels_N[:, None]).mean())
            else:
                p_N = logp_NV.amax(1).exp().clamp(SMALLEST, 1 - SMALLEST)
                losses.append(torch.nn.functional.binary_cross_entropy(p_N, right_N.float()))
        best = float(grid[int(torch.stack(losses).argmin())])
        return lambda part: at_temperature(part, best)

    return fit_one


def vector_scaling(fit: Part, validation: Part) -> Method:
    """A scale and a bias for every token of the vocabulary (Guo et al.), by cross-entropy with weight decay 1e-3."""
    logits_NV, labels_N = table(fit, validation)
    scale_V = torch.ones(logits_NV.shape[1], requires_grad=True)
    bias_V = torch.zeros(logits_NV.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([scale_V, bias_V], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits_NV * scale_V + bias_V, labels_N)
        loss = loss + 1e-3 * ((scale_V - 1).square().sum() + bias_V.square().sum())
        loss.backward()
        return loss

    optimizer.step(closure)
    w_V, b_V = scale_V.detach(), bias_V.detach()
    return lambda part: from_logits(part.logits_NV * w_V + b_V, part.labels_N)


def platt(fit: Part, validation: Part) -> Method:
    """Platt scaling of the top token's log-odds."""
    top_N, right_N = confidence_of(fit, validation)
    calibrator = PlattCalibrator().fit(log_odds(top_N), right_N)
    return lambda part: remapped(part, lambda top_N: calibrator.transform(log_odds(top_N)))


def isotonic(fit: Part, validation: Part) -> Method:
    """Isotonic regression of right on the top token's probability."""
    top_N, right_N = confidence_of(fit, validation)
    calibrator = _isotonic(top_N, right_N)
    return lambda part: remapped(part, lambda top_N: calibrator.transform(log_odds(top_N)))


def _isotonic(top_N: np.ndarray, right_N: np.ndarray) -> IsotonicCalibrator:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # plateaus: the point of isotonic here
        return IsotonicCalibrator().fit(log_odds(top_N), right_N)


def histogram_binning(fit: Part, validation: Part) -> Method:
    """The rate of right tokens in 15 bins of equal mass (Zadrozny and Elkan), one success and one failure added."""
    top_N, right_N = confidence_of(fit, validation)
    edges = np.quantile(top_N, np.linspace(0, 1, BINS + 1)[1:-1])
    index_N = np.searchsorted(edges, top_N)
    hits, counts = np.bincount(index_N, right_N, minlength=BINS), np.bincount(index_N, minlength=BINS)
    rate = (hits + 1) / (counts + 2)
    return lambda part: remapped(part, lambda top_N: rate[np.searchsorted(edges, top_N)])


def adaptive(
    head: Kind, objective: Objective | None = None, *, level: Level = "token", seed: int = 0
) -> Callable[[Part, Part], Method]:
    """ATS, validation used for stopping."""

    def fit_one(fit: Part, validation: Part) -> Method:
        calibrator = fitted_ats(fit, validation, head, objective or Objective(), level, seed)
        return lambda part: gathered([calibrator.confidence(b) for b in part.batches])

    return fit_one


def adaptive_then_isotonic(head: Kind) -> Callable[[Part, Part], Method]:
    """ATS, and an isotonic curve over its confidence from the validation tokens: no distribution any more."""

    def fit_one(fit: Part, validation: Part) -> Method:
        method = adaptive(head)(fit, validation)
        seen = method(validation)
        calibrator = _isotonic(seen.top_N, seen.right_N)

        def judge(part: Part) -> Judged:
            found = method(part)
            top_N = calibrator.transform(log_odds(found.top_N))
            return Judged(top_N=np.clip(top_N, 0.0, 1.0), right_N=found.right_N, target_N=None)

        return judge

    return fit_one


@cache
def fitted_ats(
    fit: Part, validation: Part, head: Kind, objective: Objective, level: Level, seed: int
) -> AdaptiveTemperature:
    """Fitted once for all tables."""
    calibrator = AdaptiveTemperature(
        head=head, objective=objective, level=level, num_heads=4, intermediate_size=256, training=Training(seed=seed)
    )
    return calibrator.fit(fit.batches, validation=validation.batches)


# what they share


def table(*parts: Part) -> tuple[Tensor, Tensor]:
    """Logits and labels of several parts."""
    return torch.cat([p.logits_NV for p in parts]), torch.cat([p.labels_N for p in parts])


def confidence_of(*parts: Part) -> tuple[np.ndarray, np.ndarray]:
    """The uncalibrated top probability and whether it is right."""
    found = [at_temperature(p, 1.0) for p in parts]
    return np.concatenate([f.top_N for f in found]), np.concatenate([f.right_N for f in found])


def at_temperature(part: Part, t: float) -> Judged:
    """Every logit divided by t."""
    return gathered([confidence_at(b, torch.full((len(b),), t)) for b in part.batches])


def gathered(found: list) -> Judged:
    """The confidences of all batches."""
    top, target, right, _ = (torch.cat(each) for each in zip(*found, strict=True))
    return Judged(top_N=top.double().clamp(max=1.0).numpy(), right_N=right.numpy(), target_N=target.double().numpy())


def from_logits(logits_NV: Tensor, labels_N: Tensor) -> Judged:
    """From a whole table."""
    p_NV = logits_NV.double().softmax(1)
    top_N, id_N = p_NV.max(1)
    return Judged(
        top_N=top_N.numpy(),
        right_N=(id_N == labels_N).numpy(),
        target_N=p_NV.gather(1, labels_N[:, None])[:, 0].numpy(),
    )


def remapped(part: Part, curve: Callable[[np.ndarray], np.ndarray]) -> Judged:
    """Another probability for the same top token."""
    raw = at_temperature(part, 1.0)
    return Judged(top_N=np.clip(curve(raw.top_N), 0.0, 1.0), right_N=raw.right_N, target_N=None)


def log_odds(p_N: np.ndarray) -> np.ndarray:
    """Of probabilities held inside (0, 1)."""
    p_N = np.clip(p_N, SMALLEST, 1 - SMALLEST)
    return np.log(p_N) - np.log1p(-p_N)


BASELINES: dict[str, Callable[[Part, Part], Method]] = {
    "uncalibrated": uncalibrated,
    "temperature": temperature("cross_entropy"),
    "temperature, top-label loss": temperature("top_label"),
    "vector scaling": vector_scaling,
    "Platt on confidence": platt,
    "isotonic on confidence": isotonic,
    "histogram binning": histogram_binning,
}
