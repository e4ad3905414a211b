"""Does the calibrated reward still mean what it says? Scores and verified labels of the last rows, judged against the fit.

    monitor = DriftMonitor(calibrator)
    monitor.update(logits, labels, step=step, policy_version=version, clusters=prompt_ids)   # label known at once
    monitor.remember(ids, logits, step=step); ...; monitor.label(ids, labels)                # label comes later
    report = monitor.report()
    report.state        # ok | warn | drift | insufficient_data; report.checks say why

Only labels can raise `drift`: in RL scores are supposed to move, so what scores alone show (PSI, support) is a `warn`.
Rows are kept in `memory`, numbers come from `labels` and `judgement`, states from `drift_report`, new calibrations from `refit`.
"""

from rlalign.calibration.drift.drift_monitor import DriftMonitor, RefitOutcome
from rlalign.calibration.drift.drift_report import Check, DriftLimits, DriftReport, DriftState
from rlalign.calibration.drift.judgement import Bin, Labels, Segment, Shift
from rlalign.calibration.drift.memory import Counts, LabelOutcome

__all__ = [
    "Bin", "Check", "Counts", "DriftLimits", "DriftMonitor", "DriftReport", "DriftState", "LabelOutcome", "Labels",
    "RefitOutcome", "Segment", "Shift",
]  # fmt: skip
