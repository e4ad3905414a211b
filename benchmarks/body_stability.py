"""Run the demo in bf16 without a correction, over learning rates and seeds, with both bodies in turn: which runs collapse?

    python -m benchmarks.body_stability [--rates 3e-4 1e-3 3e-3] [--seeds 3] [--steps 60] [--runs FILE]

A run *collapses* where its last quarter's mean reward is below half of its best quarter's; runs continue where the table is
already written (`--runs FILE`, one JSON line a run). What follows from it is in results/body_mirrored.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

from rlalign.ranks import environment_without_launcher
from rlalign.tracking.environment import cpu_model

BODIES = ("model", "mirrored")
SAME = [
    "tracking.wandb=disabled", "tracking.tokens_every=0", "mismatch.head_every=0", "mismatch.action=warn", "overwrite=true",
    "tracking.eval_every=1000", "rollout.enforce_eager=true",
]  # fmt: skip
QUARTERS = 4


def run(body: str, rate: float, seed: int, steps: int, extra: list[str]) -> dict[str, object]:
    """One run in a process of its own: reward by quarter, accuracy at both ends, k3 at lag 0; how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "rlalign.cli", "train", "--config-name", "demo", f"output_dir={folder}/run", *SAME,
            f"trainer.body={body}", f"algo.lr={rate}", f"seed={seed}", f"steps={steps}", *extra,
        ]  # fmt: skip
        environment = environment_without_launcher() | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        file = Path(folder, "run", "metrics.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not rows or (done.returncode and "reward/mean" not in rows[0]):
        raise RuntimeError(done.stderr[-2000:])
    quarters = [[r["reward/mean"] for r in rows if QUARTERS * r["step"] // steps == q] for q in range(QUARTERS)]
    k3 = [r["mismatch/lag0/k3"] for r in rows]
    return {
        "body": body, "rate": rate, "seed": seed, "steps": steps, "extra": extra,
        "reward": [round(fmean(q), 3) if q else None for q in quarters],
        "accuracy": [r["eval/accuracy"] for r in rows if "eval/accuracy" in r],
        "k3_mean": fmean(k3), "k3_max": max(k3), "exit": done.returncode, "last_step": rows[-1]["step"],
        "why": done.stderr.strip().splitlines()[-1][:200] if done.returncode else "",
    }  # fmt: skip


def collapsed(found: dict) -> bool:
    """The last quarter's mean reward is below half of the best quarter's, or the run stopped."""
    known = [r for r in found["reward"] if r is not None]
    return found["exit"] != 0 or known[-1] < max(known) / 2


def table(runs: list[dict]) -> str:
    """Markdown, one row per rate and body."""
    lines = [
        "| learning rate | body | seeds | collapsed | reward, by quarter, of each seed | accuracy, end | k3, lag 0 | largest |",
        "|--:|---|--:|--:|---|---|--:|--:|",
    ]
    for rate in sorted({r["rate"] for r in runs}):
        for body in BODIES:
            some = [r for r in runs if (r["rate"], r["body"]) == (rate, body)]
            if some:
                rewards = "; ".join(" ".join("-" if q is None else f"{q:.2f}" for q in r["reward"]) for r in some)
                final = ", ".join(f"{r['accuracy'][-1]:.2f}" if r["accuracy"] else "-" for r in some)
                lines.append(
                    f"| {rate:g} | {body} | {len(some)} | {sum(map(collapsed, some))} | {rewards} | {final} "
                    f"| {fmean(r['k3_mean'] for r in some):.1e} | {max(r['k3_max'] for r in some):.1e} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Run what has not run yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", type=Path, default=Path("body_stability.jsonl"))
    parser.add_argument("extra", nargs="*", help="of the configuration, for both bodies")
    options = parser.parse_args()
    have = [json.loads(line) for line in options.runs.read_text().splitlines()] if options.runs.exists() else []
    have = [r for r in have if (r["steps"], r["extra"]) == (options.steps, options.extra)]
    done = {(r["body"], r["rate"], r["seed"]) for r in have}
    for seed in range(options.seeds):
        for rate in options.rates:
            for body in BODIES:
                if (body, rate, seed) not in done:
                    have.append(run(body, rate, seed, options.steps, options.extra))
                    with options.runs.open("a") as file:
                        file.write(json.dumps(have[-1]) + "\n")
                    print(json.dumps(have[-1]), file=sys.stderr, flush=True)
    print(f"{cpu_model()}, {options.steps} steps, {' '.join(options.extra) or 'no correction'}.\n\n{table(have)}")


if __name__ == "__main__":
    main()
