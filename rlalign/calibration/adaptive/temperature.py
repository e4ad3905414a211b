"""An adaptive temperature: a small head reads how sure a token should be; fitted, applied, saved and read back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from rlalign.calibration.adaptive import heads
from rlalign.calibration.adaptive.batches import LEVELS, Batch, Batches, ClassBatch, Level
from rlalign.calibration.adaptive.fitting import OUTPUTS, AdaptiveFit, Fitting, Output, Training, scale_of, standardise
from rlalign.calibration.adaptive.heads import KINDS, HeadShape, Kind, TemperatureHead
from rlalign.calibration.adaptive.sums import Objective
from rlalign.calibration.calibrators import calibration_file
from rlalign.calibration.calibrators.calibration_file import (
    CalibrationMismatchError,
    Json,
    ModelIdentity,
    NotFittedError,
)

METHOD = "adaptive_temperature"


class Confidence(NamedTuple):
    """Per token or row, float32: calibrated probability of the top one and of the target, whether they are the same."""

    top_N: Tensor
    target_N: Tensor
    right_N: Tensor
    temperature_N: Tensor


class AdaptiveTemperature:
    """One inverse temperature per token (or per sequence, or per row), from a head on the last hidden state.

    head: "transformer", one decoder layer as in the paper, which needs whole sequences; "mlp"; "linear" (D + 1 numbers);
    "constant", a single temperature. None: transformer for sequences, linear for pooled states, the ones that win in
    benchmarks/results/adaptive.md. intermediate_size, num_heads: widths, by default 4 D and heads of 64.
    bounds: smallest and largest T. level: a temperature for each token, or one for a sequence, read where its first
    token is predicted. output: whether the raw output is log 1/T, so that exp(output) multiplies the logits as in the
    official code (default), or log T, so that it divides them. A linear last layer learns the one as the negative of
    the other, so the choice matters for reading checkpoints only.
    Fitted: head_ (float32, on the device of the hidden states), diagnostics_, model_.
    """

    def __init__(
        self,
        *,
        head: Kind | None = None,
        intermediate_size: int | None = None,
        num_heads: int | None = None,
        objective: Objective | None = None,
        training: Training | None = None,
        bounds: tuple[float, float] = (0.1, 100.0),
        level: Level = "token",
        output: Output = "log_inverse_temperature",
    ) -> None:
        for name, value, allowed in (("head", head, KINDS), ("level", level, LEVELS), ("output", output, OUTPUTS)):
            if value not in allowed and (name, value) != ("head", None):
                raise ValueError(f"AdaptiveTemperature: {name} must be one of {', '.join(allowed)}, got {value!r}")
        if not 0.0 < bounds[0] < bounds[1] < float("inf") or not bounds[0] <= 1.0 <= bounds[1]:
            raise ValueError(f"AdaptiveTemperature: bounds must be a finite range of temperatures with 1, got {bounds}")
        self.kind: Kind | None = head
        self.intermediate_size, self.num_heads = intermediate_size, num_heads
        self.objective, self.training = objective or Objective(), training or Training()
        self.bounds = (float(bounds[0]), float(bounds[1]))
        self.level: Level = level
        self.output: Output = output
        self.head_: TemperatureHead | None = None
        self.diagnostics_: AdaptiveFit | None = None
        self.model_ = ModelIdentity()

    def fit(
        self,
        batches: Batches[Batch],
        *,
        validation: Batches[Batch] = (),
        progress: Callable[[str], None] = lambda _: None,
    ) -> Self:
        """Train the head, and nothing else, on batches that `len` and `[i]` give, the same ones every time.

        Give validation batches of other prompts, a fifth or so: they decide when to stop (see Training). The result is
        a function of the batches and of `training.seed`. progress: told once an epoch. Raises ValueError without
        batches or on hidden states the head cannot read, RuntimeError when the loss leaves the finite numbers. A fit
        that raises leaves the calibrator as it was.
        """
        if len(batches) == 0:
            raise ValueError("AdaptiveTemperature.fit: no batches")
        first = batches[0].hidden
        default: Kind = "transformer" if first.dim() == 3 else "linear"
        shape = HeadShape(
            kind=self.kind or default,
            hidden_size=first.shape[-1],
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training.seed)
            head = TemperatureHead(shape)
        head.to(first.device)
        standardise(head, batches)
        fitting = self._fitting(head)
        diagnostics = fitting.run(batches, validation, progress)
        self.head_, self.diagnostics_ = head.requires_grad_(False), diagnostics
        pairs = [
            b for b in (batches[i] for i in range(len(batches))) if isinstance(b, ClassBatch) and b.num_classes == 2
        ]
        if len(pairs) == len(batches):
            self.diagnostics_ = replace(diagnostics, kendall_tau=self._rank_agreement(pairs))
        self.model_ = ModelIdentity()
        return self

    @torch.no_grad()
    def temperatures(self, hidden: Tensor) -> Tensor:
        """The temperature that divides the logits of each token: [B, L] for hidden states [B, L, D], float32.

        Aligned to token_ids like every per-token array: entry t comes from the hidden state at t - 1, entry 0 is 1.0.
        It is what `token_logprobs` takes as `temperature`. Pooled states [N, D] give [N], each its own.
        Raises NotFittedError before a fit, ValueError at level sequence, where prompts must be known: use `confidence`.
        """
        if hidden.dim() == 3 and self.level == "sequence":
            raise ValueError(
                "AdaptiveTemperature.temperatures: level 'sequence' reads a prompt's end; use temperature_of"
            )
        head = self.require_fitted()
        temperature = 1.0 / scale_of(head(hidden), self.bounds, self.output)
        return temperature if hidden.dim() == 2 else torch.nn.functional.pad(temperature[:, :-1], (1, 0), value=1.0)

    @torch.no_grad()
    def temperature_of(self, batch: Batch) -> Tensor:
        """The temperature of each scored token or row of a batch, [N], at either level."""
        return 1.0 / self._fitting(self.require_fitted()).scale(batch)

    @torch.no_grad()
    def transform(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Probabilities of classes from pooled states [N, D]: softmax(z / T) for [N, K], sigmoid(r / T) for rewards [N].

        The order of the classes of a row stays; the order of rows does not: T(h) differs between responses, so a
        higher reward may get a lower probability. diagnostics_.kendall_tau says how often. For a reward subtract the bias
        that was fitted with first. Raises ValueError on shapes that do not fit.
        """
        if hidden.dim() != 2 or logits.dim() not in (1, 2) or len(logits) != len(hidden):
            raise ValueError(
                f"transform: expected logits [N] or [N, K], hidden [N, D]; got {logits.shape}, {hidden.shape}"
            )
        temperature_N = self.temperatures(hidden)
        if logits.dim() == 1:
            return torch.sigmoid(logits.float() / temperature_N)
        return torch.softmax(logits.float() / temperature_N[:, None], dim=1)

    @torch.no_grad()
    def confidence(self, batch: Batch) -> Confidence:
        """Calibrated probabilities of the scored tokens (rows) of a batch, in one or two passes over the vocabulary."""
        return confidence_at(batch, self.temperature_of(batch))

    @property
    def calibration_id(self) -> str:
        """Names the fitted function (bytes, shape, how its output is read): equal ids give equal temperatures."""
        return calibration_file.function_id(METHOD, _function(self, _weights(self)))

    def save(self, path: str | Path, *, model: ModelIdentity | None = None) -> None:
        """Write weights beside `path` (safetensors), then `path` (JSON), bound to `model`; remove the weights it named before.

        Raises NotFittedError, and ValueError where `path` is called like the weights.
        """
        path = Path(path)
        if path.suffix == ".safetensors":
            raise ValueError(f"{path}: name the JSON file; the weights go beside it")
        weights = _weights(self)
        function = _function(self, weights)
        beside = path.with_name(f"{path.stem}-{function['sha256'][:12]}.safetensors")
        content: Json = {
            "method": METHOD,
            "options": {
                "objective": asdict(self.objective),
                "training": asdict(self.training),
            },
            "params": function | {"weights": beside.name},
            "fit": None if self.diagnostics_ is None else asdict(self.diagnostics_),
        }
        before = _weights_named_in(path)
        calibration_file.write_atomic(beside, weights)
        calibration_file.write(path, content, model or self.model_)
        if before is not None and before != beside:
            before.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, *, expect_model: ModelIdentity | None = None, strict: bool = True) -> Self:
        """Read what `save` wrote; temperatures are bit-equal. Errors as `rlalign.calibration.calibrators` loads.

        Weights whose digest does not fit are refused even with strict=False.
        """
        from safetensors.torch import load as read_tensors

        path = Path(path)
        content, model = calibration_file.read(path, expect_model=expect_model, strict=strict)
        if content.get("method") != METHOD:
            raise ValueError(
                f"{path}: method {content.get('method')!r}, expected {METHOD!r}; see rlalign.calibration.calibrators"
            )
        try:
            params, options = content["params"], content["options"]
            shape = HeadShape(**params["shape"])
            calibrator = cls(
                head=shape.kind,
                intermediate_size=shape.intermediate_size,
                num_heads=shape.num_heads,
                objective=Objective(**options["objective"]),
                training=Training(**options["training"]),
                bounds=tuple(params["bounds"]),
                level=params["level"],
                output=params["output"],
            )
            calibrator.diagnostics_ = None if content["fit"] is None else AdaptiveFit.from_json(content["fit"])
            beside, digest = path.with_name(params["weights"]), params["sha256"]
        except (KeyError, TypeError) as error:
            raise CalibrationMismatchError(f"{path}: fields that this rlalign does not know ({error!r})") from error
        if not beside.is_file():
            raise CalibrationMismatchError(f"{path}: its weights {beside.name} are not beside it; copy both files")
        weights = beside.read_bytes()
        if hashlib.sha256(weights).hexdigest() != digest:
            raise CalibrationMismatchError(
                f"{beside}: not the weights that {path.name} was saved with; save both again"
            )
        head = TemperatureHead(shape)
        head.load_state_dict(read_tensors(weights))
        calibrator.head_, calibrator.model_ = head.requires_grad_(False), model
        return calibrator

    def to(self, device: torch.device | str) -> Self:
        """Move the head to where the hidden states are; a loaded one is on the CPU."""
        self.require_fitted().to(device)
        return self

    @classmethod
    def from_official(cls, folder: str | Path) -> Self:
        """A checkpoint of the official code: the same calibrated logits. Errors as `heads.read_official`."""
        head, model = heads.read_official(Path(folder))
        calibrator = cls(
            head=head.shape.kind,
            intermediate_size=head.shape.intermediate_size,
            num_heads=head.shape.num_heads,
            objective=Objective(loss="selective", alpha_form="balanced"),
            bounds=heads.BOUNDS,
        )
        calibrator.head_, calibrator.model_ = head.requires_grad_(False), model
        return calibrator

    def require_fitted(self) -> TemperatureHead:
        """The head. Raises NotFittedError before `fit` or `load`."""
        if self.head_ is None:
            raise NotFittedError("AdaptiveTemperature: not fitted yet; call fit or load first")
        return self.head_

    @property
    def report(self) -> AdaptiveFit:
        """What the fit saw. Raises NotFittedError for a head that was read and not fitted here."""
        if self.diagnostics_ is None:
            raise NotFittedError("AdaptiveTemperature: no record of a fit; call fit")
        return self.diagnostics_

    def _rank_agreement(self, batches: Sequence[ClassBatch]) -> float:
        """Kendall's tau-b between the log-odds of class 1 before and after."""
        from scipy.stats import kendalltau

        margins = [batch.logits[:, 1].double() - batch.logits[:, 0].double() for batch in batches]
        scaled = [m / self.temperature_of(batch) for m, batch in zip(margins, batches, strict=True)]
        found: Any = kendalltau(torch.cat(margins).cpu().numpy(), torch.cat(scaled).cpu().numpy())
        return float(found.statistic)

    def _fitting(self, head: TemperatureHead) -> Fitting:
        return Fitting(head, self.objective, self.training, self.bounds, self.level, self.output)


@torch.no_grad()
def confidence_at(batch: Batch, temperature_N: Tensor) -> Confidence:
    """Probabilities of a batch at given temperatures, one per scored token or row; ones for the uncalibrated model."""
    facts, scale_N = batch.facts(), 1.0 / temperature_N
    top_N = scale_N * facts.top_N
    lse_N = torch.logaddexp(top_N, batch.rest(scale_N, facts))
    target_N = torch.exp(scale_N * facts.target_N - lse_N)
    return Confidence(torch.exp(top_N - lse_N), target_N, facts.right_N, temperature_N)


def _weights(calibrator: AdaptiveTemperature) -> bytes:
    from safetensors.torch import save as write_tensors

    head = calibrator.require_fitted()
    return write_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()})


def _function(calibrator: AdaptiveTemperature, weights: bytes) -> Json:
    return {
        "shape": asdict(calibrator.require_fitted().shape),
        "bounds": list(calibrator.bounds),
        "level": calibrator.level,
        "output": calibrator.output,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }


def _weights_named_in(path: Path) -> Path | None:
    """The weights of the file that is about to be replaced; None when it is not a whole file of this kind."""
    try:
        content, _ = calibration_file.read(path, expect_model=None, strict=True)
    except (ValueError, CalibrationMismatchError):
        return None
    named = content["params"].get("weights") if content.get("method") == METHOD else None
    return None if named is None else path.with_name(Path(named).name)
