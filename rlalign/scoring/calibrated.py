"""with_calibration(): any scorer with a calibrator behind it. Scores are probabilities, logits stay what the head gave.

One answer carries exactly one calibration_id, also while the calibrator is being replaced. Nothing is calibrated twice.
K labels, T tokens or steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from rlalign.calibration.calibrators import CalibrationMismatchError, CalibrationWarning, ModelIdentity
from rlalign.scoring.params import ModelInfo, ScoringParams
from rlalign.scoring.scorer import Scoring

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlalign.calibration.calibrators import Calibrator
    from rlalign.scoring.result import ScoreResult
    from rlalign.scoring.scorer import Prepared, RewardScorer, Text


def identity_of(info: ModelInfo) -> ModelIdentity:
    """What a calibration of this model's scores is bound to."""
    return ModelIdentity(
        id=info.id,
        revision=info.revision,
        template_sha256=info.template_sha256,
        dtype=info.dtype,
        head_dtype=info.head_dtype,
        num_labels=info.num_labels or None,
    )


def require_same_model(
    calibrator: Calibrator, info: ModelInfo, *, what: str, same_folder: bool = False, bound: bool = True
) -> None:
    """Raise CalibrationMismatchError unless the calibrator was fitted on scores of this model.

    Fields are compared where both sides know them; bound: the id must be in the file. same_folder: the file lies in the model's
    own folder, which may have moved since: the id, its path, is not compared.
    """
    fitted, now = calibrator.model_, identity_of(info)
    if bound and fitted.id is None:
        raise CalibrationMismatchError(
            f"{what}: the calibration is bound to no model; fit it with rlalign calibrate --model {info.id}"
        )
    unknown = {name for name, value in asdict(fitted).items() if value is None} | ({"id"} if same_folder else set())
    if different := fitted.differences(replace(now, **dict.fromkeys(unknown))):
        raise CalibrationMismatchError(
            f"{what}: the calibration was fitted on another model ({'; '.join(different)}); fit one on this model's scores"
        )


def require_readable(calibrator: Calibrator, info: ModelInfo) -> None:
    """Raise ValueError unless the calibrator takes as many logits an item as the model gives (a judge's log-odds are one)."""
    columns = 1 if info.tasks[0] == "generative" else max(info.num_labels, 1)
    try:
        calibrator.transform(np.zeros((1, columns)))
    except ValueError as error:
        raise ValueError(f"{info.id}: the calibrator cannot read {columns} logits an item ({error})") from error


def with_calibration(scorer: RewardScorer, calibrator: Calibrator, *, strict: bool = True) -> CalibratedScorer:
    """The scorer with calibrated scores; `calibrate=False` in a request still gives them raw.

    Raises ValueError where the scores are calibrated already, here or by the server behind, or where the calibrator cannot read
    the model's logits; CalibrationMismatchError where it was fitted on another model (strict=False: CalibrationWarning).
    """
    if isinstance(scorer, CalibratedScorer):
        raise ValueError(f"{scorer.info.id}: a calibrator is attached already; replace it with swap()")
    return CalibratedScorer(scorer, calibrator, strict=strict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedRequest:
    """The request of the scorer inside, and whether its logits are calibrated afterwards."""

    inner: Prepared
    calibrate: bool
    generative: bool

    @property
    def num_tokens(self) -> int:
        """Of the request inside."""
        return self.inner.num_tokens


class CalibratedScorer(Scoring[CalibratedRequest]):
    """A scorer and the calibrator in force. Made by `with_calibration`."""

    def __init__(self, scorer: RewardScorer, calibrator: Calibrator, *, strict: bool) -> None:
        self.scorer = scorer
        self.tokenizer = scorer.tokenizer if isinstance(scorer, Scoring) else None
        self.swap(calibrator, strict=strict)

    @property
    def calibrator(self) -> Calibrator:
        """In force now; requests that run already finish with the one they began with."""
        return self._calibrator

    def swap(self, calibrator: Calibrator, *, strict: bool = True) -> None:
        """Put another calibrator in force, atomically. Raises as `with_calibration`, and then keeps the one before."""
        _check(calibrator, self.scorer.info, strict=strict)
        self._calibrator = calibrator
        self.info = msgspec.structs.replace(self.scorer.info, calibration_id=calibrator.calibration_id)

    def prepare(
        self, query: Text, items: Text | Sequence[Text], params: ScoringParams | None = None
    ) -> CalibratedRequest:
        """Check a request, calibration included. Raises ValueError before any computation."""
        wanted = (params or ScoringParams()).verify(self.info)
        calibrate = bool(wanted.calibrate)
        plain = msgspec.structs.replace(wanted, calibrate=None if wanted.calibrate is None else False)
        inner = self.scorer.prepare(query, items, plain)
        return CalibratedRequest(inner=inner, calibrate=calibrate, generative=wanted.task == "generative")

    def run(self, requests: Sequence[CalibratedRequest]) -> list[ScoreResult]:
        """Score, then calibrate what asked for it, all with the calibrator that was in force when the run began."""
        calibrator = self._calibrator
        results = self.scorer.run([request.inner for request in requests])
        return [
            calibrated(result, calibrator, generative=request.generative) if request.calibrate else result
            for request, result in zip(requests, results, strict=True)
        ]


def calibrated(result: ScoreResult, calibrator: Calibrator, *, generative: bool) -> ScoreResult:
    """The result with scores from its logits: shaped as those; [1] for a judge, from the log-odds of its first label.

    Raises ValueError where the result was calibrated before, and on a judge with other than two labels.
    """
    if result.calibration_id != "identity":
        raise ValueError(f"{result.model}: these scores were calibrated by {result.calibration_id} already")
    scores = [None if logits is None else _probabilities(logits, calibrator, generative) for logits in result.logits]
    return replace(result, scores=scores, calibration_id=calibrator.calibration_id)


def _probabilities(logits: NDArray[np.float32], calibrator: Calibrator, generative: bool) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    if generative:
        if len(x) != 2:
            raise ValueError(f"a judge is calibrated by the log-odds of exactly two labels, got {len(x)}")
        x = x[:1] - x[1:]
    return calibrator.transform(x.reshape(-1, x.shape[-1])).reshape(x.shape)


def _check(calibrator: Calibrator, info: ModelInfo, *, strict: bool) -> None:
    if info.already_calibrated:
        raise ValueError(
            f"{info.id}: the server shifts and scales its scores already (logit_mean, logit_sigma), or nothing shows that it does "
            "not; calibrating them again would be wrong. Serve the model without, show that it is (HTTPScorer: known_logits, "
            "server_calibrated=False), or do without this calibrator"
        )
    require_readable(calibrator, info)
    try:
        require_same_model(calibrator, info, what=info.id, bound=False)
    except CalibrationMismatchError as error:
        if strict:
            raise
        warnings.warn(str(error), CalibrationWarning, stacklevel=4)
