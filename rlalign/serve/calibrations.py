"""The one calibration in force, how it is replaced while requests run, and whether it still holds.

A request takes the calibration once, when it comes in, and uses nothing else: each response carries exactly one id.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import msgspec

from rlalign.calibration.calibrators import CalibrationMismatchError, Calibrator, IdentityCalibrator
from rlalign.calibration.drift import DriftMonitor, DriftReport, LabelOutcome
from rlalign.scoring.calibrated import require_readable, require_same_model
from rlalign.serve.bodies import ApiError, invalid

if TYPE_CHECKING:
    from rlalign.calibration.calibrators.calibration_file import Json
    from rlalign.scoring.params import ModelInfo
    from rlalign.serve.settings import ServerSettings

log = logging.getLogger("rlalign.server")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class InForce:
    """One calibration and the document it came from. document None: none was given, and scores are raw."""

    calibrator: Calibrator
    document: Json | None

    @property
    def given(self) -> bool:
        """Whether scores are calibrated unless a request says otherwise."""
        return self.document is not None

    @property
    def id(self) -> str:
        """What responses carry."""
        return self.calibrator.calibration_id


class Calibrations:
    """Holds what is in force. Drift is watched in one thread of its own, in the order in which things happened."""

    def __init__(self, info: ModelInfo, settings: ServerSettings) -> None:
        self._info = info
        self._settings = settings
        self.in_force = InForce(IdentityCalibrator(), None)
        self._monitor: DriftMonitor | None = None
        self._unwatched = "no calibration is in force; PUT one to /v1/calibration"
        self._thread = ThreadPoolExecutor(1, "rlalign-drift")
        self._now = 0

    def begin_with(self, document: Json) -> None:
        """Put a document in force before any request. Raises ValueError where `replace` would raise ApiError."""
        try:
            loaded = self._read(document)
        except ApiError as error:
            raise ValueError(f"calibration: {error.detail}") from error
        self._watch(loaded.calibrator)
        self.in_force = loaded

    async def replace(self, document: Json) -> InForce:
        """Put a calibration document in force for every request that comes in from now on.

        Raises ApiError 409 when it is for another model, 400 when it is not a calibration document.
        """
        loaded = await self._in_thread(lambda: self._read(document))
        self._thread.submit(self._watch, loaded.calibrator).add_done_callback(_logged)
        self.in_force = loaded  # no await since the line above: a cancelled request swaps both or neither
        log.info("calibration %s is in force", loaded.id)
        return loaded

    def remember(self, used: InForce, ids: Sequence[str], logits: Sequence[float], policy_version: int | None) -> None:
        """Note scores whose labels may come later."""
        if not used.given or not ids:
            return
        self._thread.submit(self._remember, used, ids, logits, policy_version).add_done_callback(_logged)

    async def label(self, ids: Sequence[str], labels: Sequence[float], weights: Sequence[float]) -> LabelOutcome:
        """Labels of scores that this server gave. Raises ApiError 409 where nothing is watched, 400 on bad labels."""
        return await self._watched(lambda monitor: monitor.label(ids, labels, weight=weights))

    async def label_logits(
        self,
        logits: Sequence[float],
        labels: Sequence[float],
        weights: Sequence[float],
        policy_versions: Sequence[int] | None,
    ) -> LabelOutcome:
        """Labels of logits that the client kept itself. Raises as `label`."""
        return await self._watched(
            lambda monitor: monitor.update(
                logits, labels, weight=weights, policy_version=policy_versions, step=self._step()
            )
        )

    async def drift(self) -> DriftReport:
        """What the labels say of the calibration in force. Raises ApiError 409 where nothing is watched."""
        return await self._watched(lambda monitor: monitor.report())

    def close(self) -> None:
        """Stop watching."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _watched(self, work: Callable[[DriftMonitor], T]) -> T:
        def guarded() -> T:
            if self._monitor is None:
                raise ApiError(409, f"drift is not watched: {self._unwatched}", type="drift_not_watched")
            try:
                return work(self._monitor)
            except ValueError as error:
                raise invalid(str(error)) from error

        return await self._in_thread(guarded)

    def _remember(self, used: InForce, ids: Sequence[str], logits: Sequence[float], version: int | None) -> None:
        # a score of the calibration before a swap would be judged by the one after it
        if self._monitor is not None and self._monitor.calibrator is used.calibrator:
            self._monitor.remember(ids, logits, step=self._step(), policy_version=version)

    def _step(self) -> int:
        """Unix seconds: the server knows no training step. Never falls, whatever the machine's clock does."""
        self._now = max(self._now, int(time.time()))
        return self._now

    def _watch(self, calibrator: Calibrator) -> None:
        try:
            if self._monitor is None:
                self._monitor = DriftMonitor(
                    calibrator, window=self._settings.drift_window, min_labels=self._settings.drift_min_labels
                )
            else:
                self._monitor.swap(calibrator)
        except ValueError as error:
            self._monitor, self._unwatched = None, str(error)
            log.warning("drift is not watched: %s", error)

    def _read(self, document: Json) -> InForce:
        if self._info.already_calibrated:
            raise _mismatch(
                "the scores arrive already shifted and scaled from the engine behind; they must not be twice"
            )
        try:
            calibrator = Calibrator.of_document(document, "the document")
        except CalibrationMismatchError as error:
            raise _mismatch(str(error)) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise invalid(f"not a calibration: {error}") from error
        info, name = self._info, self._settings.model_name
        named = msgspec.structs.replace(info, id=name) if name == calibrator.model_.id else info
        try:
            require_same_model(calibrator, named, what="the document")
        except CalibrationMismatchError as error:
            raise _mismatch(str(error)) from error
        try:
            require_readable(calibrator, info)
        except ValueError as error:
            raise _mismatch(str(error)) from error
        return InForce(calibrator, document)


def _mismatch(message: str) -> ApiError:
    return ApiError(409, message, type="calibration_mismatch")


def _logged(done: Future[None]) -> None:
    if not done.cancelled() and (error := done.exception()):
        log.error("the drift monitor failed", exc_info=error)
