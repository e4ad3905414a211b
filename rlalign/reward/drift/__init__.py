"""Does the calibrated reward still mean what it says? Scores and verified labels of the last rows, judged against the fit.

    monitor = DriftMonitor(calibrator)
    monitor.update(logits, labels, step=step, policy_version=version, clusters=prompt_ids)   # label known at once
    monitor.remember(ids, logits, step=step); ...; monitor.label(ids, labels)                # label comes later
    report = monitor.report()
    report.state        # ok | warn | drift | insufficient_data; report.checks say why

Only labels can raise `drift`: in RL scores are supposed to move, so what scores alone show (PSI, support) is a `warn`.
Rows are kept in `rows`, numbers come from `labels` and `measure`, states from `report`, new calibrations from `refit`.
"""

from rlalign.reward.drift.labels import Bin, Labels, Segment
from rlalign.reward.drift.measure import Shift
from rlalign.reward.drift.monitor import DriftMonitor
from rlalign.reward.drift.refit import RefitOutcome
from rlalign.reward.drift.report import Check, DriftLimits, DriftReport, DriftState
from rlalign.reward.drift.rows import Counts, LabelOutcome

__all__ = [
    "Bin", "Check", "Counts", "DriftLimits", "DriftMonitor", "DriftReport", "DriftState", "LabelOutcome", "Labels",
    "RefitOutcome", "Segment", "Shift",
]  # fmt: skip
