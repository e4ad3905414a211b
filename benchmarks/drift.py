"""The drift monitor: false alarms and delays on simulated runs, then a reward model that is hacked while it is watched.

    python benchmarks/drift.py

Trains a reward model on few labels of the tiny policy, runs the demo's GRPO against it twice (with its first calibration,
with refits), and writes results/drift.md with its plot. Seeded; two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import drift_runs
import drift_simulation
import numpy as np

from rlalign.tracking.environment import snapshot
from rlalign.tracking.record import RunRecord, read_run

RESULTS = Path(__file__).parent / "results"
SECONDS = "seconds.json"
SAMPLES = 256  # of one step of the demo
COLORS = {"rm": "#c8501e", "verifier": "#0b62a8", "accuracy": "#2a8c5a"}


def main() -> None:
    """Run everything that the work folder does not hold; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/drift-benchmark"))
    parser.add_argument("--keep", action="store_true", help="go on with what the work folder holds; else it is emptied")
    parser.add_argument("--until", choices=("runs", "page"), default="page", help="runs: stop before the simulation")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--simulated-runs", type=int, default=40)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    if not arguments.keep:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    with timed(work, "reward model"):
        model = drift_runs.reward_model(work / "reward_model")
    for name in drift_runs.RUNS:
        with timed(work, name):
            drift_runs.run(name, model, work)
    if arguments.until == "runs":
        return
    table = work / "simulated.md"
    with timed(work, "simulation"):
        if not table.exists():
            table.write_text(drift_simulation.tables(arguments.simulated_runs, processes=2))
    records = {name: read_run(work / name) for name in drift_runs.RUNS}
    plot(arguments.out / "drift.png", records)
    (arguments.out / "drift.md").write_text(
        page(table.read_text(), model, records, json.loads((work / SECONDS).read_text()))
    )
    print(f"{arguments.out / 'drift.md'}")


@contextmanager
def timed(work: Path, name: str) -> Iterator[None]:
    """Says and keeps how long a part took; a part that was there already keeps its time."""
    file, began = work / SECONDS, time.monotonic()
    yield
    took = json.loads(file.read_text()) if file.exists() else {}
    took.setdefault(name, time.monotonic() - began)
    file.write_text(json.dumps(took))
    print(f"{name}: {took[name]:.0f} s", flush=True)


def plot(path: Path, records: dict[str, RunRecord]) -> None:
    """Promise, verifier and held-out accuracy of the runs side by side, with what the monitor said below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * len(records), 5.4), layout="constrained")
    axes = figure.subplots(2, len(records), sharex=True, sharey="row", height_ratios=(2, 1), squeeze=False)
    for column, (name, record) in enumerate(records.items()):
        above, below = axes[0][column], axes[1][column]
        shade(above, record)
        for key, label, color in (
            ("reward/rm/mean", "reward model's probability: the reward", COLORS["rm"]),
            ("reward/verifier/mean", "verifier, same samples", COLORS["verifier"]),
            ("eval/accuracy", "held-out accuracy", COLORS["accuracy"]),
        ):
            steps, values = record.series(key)
            above.plot(steps, values, color=color, label=label, marker="o" if "eval" in key else None, markersize=4)
        above.set(title=name, ylim=(0, 0.8))
        for key, label, color in (
            ("reward/drift/rm/recent_gap", "E[p] - E[y], newest rows", COLORS["rm"]),
            ("reward/drift/rm/recent_tilt", "tilt, newest rows", "#8a4fbf"),
            ("reward/drift/rm/ece", "debiased ECE", "#444b57"),
        ):
            below.plot(*record.series(key), color=color, label=label, linewidth=1.2)
        below.axhline(0, color="#b9bec8", linewidth=0.8)
        below.set(xlabel="step", ylim=(-0.2, 0.65))
        versions = record.series("reward/drift/rm/calibration_version")
        for step in np.array(versions[0])[1:][np.diff(versions[1]) > 0]:
            below.axvline(step, color="#2a8c5a", linewidth=0.8, linestyle=":")
    axes[0][0].legend(loc="upper left", frameon=False, fontsize=8)
    axes[1][0].legend(loc="upper left", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def shade(axes, record: RunRecord) -> None:
    """The state of every step behind the curves: yellow is warn, red is drift, grey too few labels."""
    colors = {1: "#fbeec2", 2: "#f6cfc9", -1: "#e6e8ec"}
    for step, state in zip(*record.series("reward/drift/rm/state"), strict=True):
        if state in colors:
            axes.axvspan(step - 0.5, step + 0.5, color=colors[state], linewidth=0)


def page(
    simulated: str, model: drift_runs.RewardModel, records: dict[str, RunRecord], seconds: dict[str, float]
) -> str:
    """The whole report."""
    machine = snapshot()
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("rlalign", "vllm", "torch", "deepspeed"))
    stories = {name: drift_runs.story(record, SAMPLES) for name, record in records.items()}
    return TEXT.format(
        seconds=", ".join(f"{name} {took:.0f} s" for name, took in seconds.items()),
        machine=f"{machine['cpu']}, {machine['cores_usable']} cores; {versions}",
        simulated=simulated, steps=drift_runs.STEPS, model=model, right=drift_runs.TRAINED, runs=runs_table(stories),
        refits=refits(records["refit"]), common=" ".join(drift_runs.COMMON), refit=" ".join(drift_runs.RUNS["refit"]),
        trailing=drift_runs.TRAILING * SAMPLES,
    )  # fmt: skip


def runs_table(stories: dict[str, drift_runs.Story]) -> str:
    """One column per run."""

    def step(value: int | None) -> str:
        return "never" if value is None else f"step {value}"

    rows = {
        "reward (calibrated probability), first and last step": lambda s: " -> ".join(f"{v:.3f}" for v in s.rm),
        "verifier on the same samples, first, best, last 4 steps": lambda s: " -> ".join(
            f"{v:.3f}" for v in s.verifier
        ),
        "held-out accuracy, first, best, last": lambda s: " -> ".join(f"{v:.3f}" for v in s.accuracy),
        "monitor: first `warn`": lambda s: step(s.warn),
        "monitor: first `drift`": lambda s: step(s.drift),
        "verifier significantly below its best": lambda s: step(s.falls),
        "verifier significantly below its start": lambda s: step(s.below_start),
        "calibrations in force": lambda s: str(s.calibrations),
    }
    lines = ["| | " + " | ".join(stories) + " |", "|---|" + "--:|" * len(stories)]
    lines += [f"| {label} | " + " | ".join(show(s) for s in stories.values()) + " |" for label, show in rows.items()]
    return "\n".join(lines)


def refits(record: RunRecord) -> str:
    """The refits of a run that were taken, and how many were not."""
    said = [(e["step"], e["message"]) for e in record.events if e["kind"] == "drift/refit"]
    taken = [f"- before step {step + 2}: {text.split(': ', 1)[1]}" for step, text in said if "(version" in text]
    return "\n".join([*taken, f"- {len(said) - len(taken)} more refits left the calibration that was in force."])


TEXT = """# The drift monitor: false alarms, delays, and a reward model that is hacked while it is watched

`python benchmarks/drift.py` on {machine}. Time, on a machine that others used too: {seconds}.

## Simulated runs

64 labelled rows a step (8 prompts x 8 responses), a window of 2000 rows, default limits, 120 steps. The score explains a part
of success; prompts differ in a difficulty that it does not see. Judged every 10 steps, after a change at every step (from the
tenth on at every fifth).

{simulated}

A calibration on 400 rows of 50 prompts is itself off by chance, so the alarms of that row are not all false. The two worlds in
italics are what happens to who leaves out `clusters` or `weight`: noise becomes alarms, and a calibration that is right is
blamed for how its labels were picked. A change of 0.04 is within the limit of 0.05: there, no `drift` is the right answer.

## A reward model under GRPO

A reward model learned from {model.labels} labelled completions of {right} prompts by the initial policy, and was calibrated on
{model.calibrated_on} completions of other prompts (AUROC there: {model.auroc:.3f}). The demo then runs {steps} steps of GRPO with
its calibrated probability as the only reward. The verifier sees every sample and is not trained on. Both runs: `{common}`;
with refits: `{refit}`.

{runs}

Significantly: the mean of {trailing} samples (4 steps) is lower by more than three standard errors, counting every prompt once.

![runs](drift.png)

Shaded: yellow `warn`, red `drift`, grey too few labels since the last refit. Dotted: a new calibration.

{refits}

What a refit does: where the score no longer tells right from wrong the slope falls, in the extreme to a constant reward, and
KL weighs more; a later refit can give the reward model its say back. It does not make the reward model better, and with
`algo.normalize_std=true` it would do nearly nothing. The criterion of "significantly" is careful: a slow loss of a tenth does
not reach it in 60 steps, and held-out accuracy shows it. One task, one reward model, one seed of each run.
"""

if __name__ == "__main__":
    main()
