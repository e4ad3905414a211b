"""One-step-off against synchronous on the demo: steps per minute as a ratio, where the time goes, and whether it still learns.

    python benchmarks/asynchronous.py --rounds 2 > benchmarks/results/asynchronous.md

Each round runs every schedule once, one after the other, as its own process with the same seed and steps. One core trains and one
samples; the synchronous run is also given two threads on each side, which is what it could do with the second core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median

from rlalign.ranks import environment_without_launcher
from rlalign.tracking.environment import cpu_model
from rlalign.tracking.timeline import Utilisation, read_timeline, utilisation

WARM_UP = 3  # steps left out: kernels are built, caches filled
SCHEDULES = {  # name -> threads, overrides
    "synchronous, 1 thread": (1, []),
    "synchronous, 2 threads": (2, ["trainer.threads=2"]),
    "one_step_off, 1 thread a side": (1, ["schedule.mode=one_step_off"]),
}
SAME = [
    "algo=tis", "tracking.wandb=disabled", "tracking.tokens_every=0", "mismatch.head_every=0", "tracking.eval_every=1000",
    "overwrite=true",
]  # fmt: skip


def run(folder: Path, threads: int, overrides: list[str]) -> tuple[list[dict], Utilisation]:
    """The metric rows of one training run, and who worked how long."""
    command = [sys.executable, "-m", "rlalign.cli", "train", "--config-name", "demo", f"output_dir={folder}"]
    environment = environment_without_launcher() | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([*command, *SAME, *overrides], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    busy = utilisation([s for s in read_timeline(folder / "timeline.jsonl") if s.step >= WARM_UP])
    assert busy is not None
    return rows, busy


def phase(rows: list[dict], name: str) -> float:
    """Median milliseconds a step of one phase, after warming up."""
    return 1000 * median(row.get(f"time/{name}_s", 0.0) for row in rows[WARM_UP:])


def table(found: dict[str, list[tuple[list[dict], Utilisation]]]) -> list[str]:
    """Speed and phases; the ratio is of the medians over all rounds."""
    first = next(iter(found))
    step = {
        name: median(row["time/step_s"] for rows, _ in runs for row in rows[WARM_UP:]) for name, runs in found.items()
    }
    lines = [
        "| schedule | ms a step | steps/min | of synchronous | waiting to sample | score + train | publish | both sides busy |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, runs in found.items():
        mean = {n: fmean(phase(rows, n) for rows, _ in runs) for n in ("rollout", "wait", "score", "train", "publish")}
        lines.append(
            f"| {name} | {1000 * step[name]:.0f} | {60 / step[name]:.0f} | {step[first] / step[name]:.2f} x "
            f"| {mean['rollout'] + mean['wait']:.0f} ms | {mean['score'] + mean['train']:.0f} ms | {mean['publish']:.0f} ms "
            f"| {100 * fmean(u.both for _, u in runs):.0f} % |"
        )
    return lines


def ceiling(found: dict[str, list[tuple[list[dict], Utilisation]]]) -> str:
    """What overlap alone could give, from the synchronous run's own phases on cores that do not slow each other down."""
    rows = next(iter(found.values()))[0][0]
    sample, learn = phase(rows, "rollout"), phase(rows, "reward") + phase(rows, "score") + phase(rows, "train")
    publish = phase(rows, "publish")
    best = (sample + learn + publish) / (max(sample, learn) + publish)
    return (
        f"Synchronous phases of {sample:.0f} ms (sampling), {learn:.0f} ms (reward, score, train) and {publish:.0f} ms (publish) "
        f"could overlap to {best:.2f} x at most."
    )


def learning(found: dict[str, list[tuple[list[dict], Utilisation]]]) -> list[str]:
    """Mean reward by quarter of the run, and the lag and k3 it was learnt at."""
    lines = [
        "| schedule | reward, by quarter of the steps | lag | staleness k3 | engine mismatch k3 |",
        "|---|---|--:|--:|--:|",
    ]
    for name, runs in found.items():
        rows = [row for rows, _ in runs for row in rows]
        steps = max(row["step"] for row in rows) + 1
        quarters = [[r["reward/mean"] for r in rows if 4 * r["step"] // steps == quarter] for quarter in range(4)]
        old = [row["staleness/k3"] for row in rows if "staleness/k3" in row]
        engine = [row["mismatch/lag0/k3"] for row in rows if "mismatch/lag0/k3" in row]
        lines.append(
            f"| {name} | {' '.join(f'{fmean(q):.3f}' for q in quarters)} | {median(r['staleness/policy/max'] for r in rows):.0f} "
            f"| {f'{median(old):.1e}' if old else 'none is old'} | {median(engine):.1e} |"
        )
    return lines


def cores() -> float:
    """How much more two processes of one thread do together than one alone: the most that any overlap can give here."""
    code = (
        "import time, torch; torch.set_num_threads(1); a = torch.randn(256, 256); n, end = 0, time.time() + 2\n"
        "while time.time() < end: a @ a; n += 1\nprint(n)"
    )

    def together(count: int) -> int:
        running = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(count)
        ]
        return sum(int(process.communicate()[0]) for process in running)

    return together(2) / together(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    found: dict[str, list] = {name: [] for name in SCHEDULES}
    gain = [cores()]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for index, (name, (threads, overrides)) in enumerate(SCHEDULES.items()):
                options = [*overrides, f"steps={arguments.steps}"]
                found[name].append(run(Path(folder, f"{number}-{index}"), threads, options))
    gain.append(cores())
    print("# One step off against synchronous\n")
    print(
        f"The demo with algo=tis: 256 completions a step, {arguments.steps} steps, {arguments.rounds} interleaved rounds. "
        f"{cpu_model()}, {os.cpu_count()} cores; two processes of plain products do {min(gain):.2f} to {max(gain):.2f} x the work "
        f"of one. Written by benchmarks/asynchronous.py; the first {WARM_UP} steps of each run are left out of the timings.\n"
    )
    print("\n".join(table(found)) + "\n\n" + ceiling(found) + "\n\n## It still learns\n\n" + "\n".join(learning(found)))


if __name__ == "__main__":
    main()
