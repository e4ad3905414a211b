"""kill -9 at random moments: what a run loses, and whether the run that goes on equals the one that nobody killed.

python -m benchmarks.kills [--seeds 0-19] [--work FOLDER] [--out benchmarks/results/kills.md]

Each seed draws a moment, kills one process of a short float32 run there, waits for the others to end, starts the same command
again (checkpoint.resume=auto) and compares every logged number, timings aside. Rows are kept in FOLDER/rows.jsonl, so that the
seeds may be run in portions. What the victim was doing is read from its own stack, written at the moment of the kill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.kills_run import LIMIT, ROOT, STEPS, Run, checkpoint_of, rows_of, wandb_id

# In nats: servers' logprobs move by 2e-6 with the batches that they meet (docs/servers.md), and their sums by more.
FLOOR = 1e-5
GRACE = 15.0  # seconds: an engine whose trainer was killed is asked to end, and ten seconds later no longer politely
# What must differ (who was there), and what cannot be close: which group was the worst, shares of tokens beyond a limit within
# the floor.
NAMES = (
    "rollout/servers", "rollout/reissued", "mismatch/lag0/group/k3_worst", "mismatch/lag0/different", "correction/changed_share"
)  # fmt: skip


@dataclass(frozen=True)
class Kill:
    """Which process dies, in a run of how many trainer ranks, and when."""

    seed: int
    setup: str  # one of SETUPS
    victim: str  # trainer | rank 1 | engine | server | both servers
    moment: str  # start-up | any | checkpoint | publish


PLAN = [
    Kill(seed, *what)
    for seed, what in enumerate(
        [
            *[("1 rank", "trainer", "start-up")] * 3,
            *[("1 rank", "trainer", "any")] * 4,
            *[("1 rank", "trainer", "checkpoint")] * 2,
            *[("1 rank", "trainer", "publish")] * 2,
            *[("2 ranks", "engine", "any")] * 2,
            ("2 ranks", "engine", "start-up"),
            ("2 ranks", "rank 1", "any"),
            ("2 ranks", "trainer", "any"),
            *[("2 ranks, 2 servers", "server", "any")] * 2,
            ("2 ranks, 2 servers", "both servers", "any"),
            ("2 ranks, 2 servers", "trainer", "any"),
        ]
    )
]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    seed: int
    setup: str
    victim: str
    second: float  # of the run's life
    doing: str
    ended: str  # how the rest of the run ended
    after: float  # seconds from the kill to that end
    orphans: int  # processes still alive GRACE seconds later
    lost: int  # logged steps that had to be done again
    trained: float  # largest difference of any reward, loss, gradient, length or count; 0: bit for bit
    measured: float  # the same of what is known of the mismatch between the engines
    floor: float  # of that, between two runs that nobody killed
    wandb: str
    said: str  # the last words of the ranks, not of those that were killed

    def good(self) -> bool:
        """What a kill may cost: the step in flight, and nothing else."""
        within = self.measured <= (FLOOR if self.floor else 0.0) and self.trained == 0.0
        return within and self.lost <= 1 and self.orphans == 0 and self.ended != "HUNG" and self.wandb != "LOST"


def wait_for_moment(run: Run, kill: Kill, draw: random.Random, first_row: float) -> None:
    """Return at the moment of the kill. Raises RuntimeError when the run ends before it."""
    if kill.moment == "start-up":  # on a quieter machine than the whole run had, no later than the first row
        moment = draw.uniform(0.05, 1.0) * first_row
        while run.age() < moment and not rows_of(run.folder):
            time.sleep(0.01)
        return
    rows, where = draw.randrange(1, STEPS), run.folder / "checkpoints"
    reached = {
        "any": lambda: True,
        "checkpoint": lambda: any(where.glob(".step-*.writing")),
        "publish": lambda: any(Path("/dev/shm").glob(f"rlalign-weights-*-{run.trainer(0)}-*")),
    }[kill.moment]
    while len(rows_of(run.folder)) < rows or not reached():
        if run.process.poll() is not None or run.age() > LIMIT:
            raise RuntimeError(f"seed {kill.seed}: the run ended before it could be killed\n{run.words()[-2000:]}")
        time.sleep(0.0005 if kill.moment != "any" else 0.01)
    time.sleep(draw.uniform(0.0, {"any": 0.6, "checkpoint": 0.05, "publish": 0.01}[kill.moment]))


def measure(kill: Kill, work: Path) -> Row:
    """Kill, wait, resume, compare."""
    whole, first_row = uninterrupted(work, kill.setup)
    floor = 0.0 if kill.setup == "1 rank" else differences(uninterrupted(work, kill.setup, again=True)[0], whole)[1]
    folder = work / f"seed-{kill.seed:02d}"
    run = Run(folder, kill.setup)
    wait_for_moment(run, kill, random.Random(kill.seed), first_row)
    while not (victims := run.victims(kill.victim)) and run.process.poll() is None:
        time.sleep(0.01)  # the engine's process starts late
    second, doing = run.age(), run.doing()
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    code = run.wait()
    after = time.monotonic() - killed
    while run.pids() and time.monotonic() < killed + after + GRACE:
        time.sleep(0.2)
    orphans = run.clean()
    ended = {None: "HUNG", -9: "killed", 0: "went on to the end"}.get(code, f"code {code}")
    lost = max(rows_of(folder), default=-1) - checkpoint_of(folder)
    before, saved, said = wandb_id(folder), checkpoint_of(folder) >= 0, run.last_words()
    if code != 0:
        print(run.words()[-1500:], file=sys.stderr)
        again = Run(folder, kill.setup)
        if again.wait() != 0:
            print(again.words()[-3000:], file=sys.stderr)
        again.clean()
    wandb = "kept" if before == wandb_id(folder) else "LOST" if saved else "new: nothing was saved"
    return Row(
        kill.seed, kill.setup, kill.victim, second, doing, ended, after, orphans, lost,
        *differences(rows_of(folder), whole), floor, wandb, said,
    )  # fmt: skip


def differences(rows: dict[int, dict], whole: dict[int, dict]) -> tuple[float, float]:
    """Largest difference of what was trained, and of what was measured of the mismatch; infinite where rows are missing."""
    if {k: v.keys() for k, v in rows.items()} != {k: v.keys() for k, v in whole.items()}:
        return float("inf"), float("inf")
    found = {"trained": 0.0, "measured": 0.0}
    for step, row in whole.items():
        for key, value in row.items():
            other = rows[step][key]
            if other != value and key not in NAMES:
                kind = "measured" if key.startswith(("mismatch/", "correction/")) else "trained"
                found[kind] = max(found[kind], float("inf") if None in (other, value) else abs(other - value))
    return found["trained"], found["measured"]


def uninterrupted(work: Path, setup: str, *, again: bool = False) -> tuple[dict[int, dict], float]:
    """The rows of a run that nobody kills, and when its first one came (kept in `work` for the next portion).

    again: of a second such run.
    """
    folder = work / f"whole-{setup.replace(', ', '-').replace(' ', '-')}{'-again' if again else ''}"
    note = folder.with_suffix(".json")
    if not note.exists():
        run = Run(folder, setup)
        while not rows_of(folder) and run.process.poll() is None:
            time.sleep(0.02)
        first_row = run.age()
        if run.wait() != 0:
            raise RuntimeError(f"the uninterrupted run failed:\n{run.words()[-3000:]}")
        note.write_text(json.dumps(first_row))
    return rows_of(folder), json.loads(note.read_text())


def table(rows: list[Row]) -> str:
    """The committed Markdown."""
    from rlalign.tracking.environment import snapshot

    versions = ", ".join(
        f"{name} {found}" for name, found in snapshot()["versions"].items() if name in ("torch", "vllm")
    )
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    lines = [
        "# kill -9 at random moments",
        "",
        f"`python -m benchmarks.kills` at {head.stdout.strip() or 'no commit'}, on two cores that others used too; {versions}.",
        f"A float32 demo run of {STEPS} steps with `checkpoint.every=1 checkpoint.resume=auto`, killed once and started again.",
        f"*phase hit*: from rank 0's own stack then. *left*: processes alive {GRACE:.0f} seconds after the end. *lost*: logged",
        "steps that had to be done again. *trained*: the largest difference of any logged reward, loss, gradient, length or",
        "count from a run that nobody killed; *none*: bit for bit. *measured*: the same of the mismatch between the engines;",
        "*floor*: of that between two runs that nobody killed. Servers meet their requests in an order of the moment, which",
        "moves the last bits.",
        "",
        "| seed | setup | killed | at s | phase hit | ended | after s | left | lost | trained | measured | floor | wandb id |",
        "|--:|---|---|--:|---|---|--:|--:|--:|--:|--:|--:|---|",
        *(
            f"| {r.seed} | {r.setup} | {r.victim} | {r.second:.1f} | {r.doing} | {r.ended} | {r.after:.1f} | {r.orphans} "
            f"| {r.lost} | {_size(r.trained)} | {_size(r.measured)} | {_size(r.floor)} | {r.wandb} |"
            for r in rows
        ),
        "",
        f"{sum(row.good() for row in rows)} of {len(rows)} lost at most the step in flight, left no process, trained bit for bit",
        f"what a run trained that nobody killed, and measured the same mismatch within {FLOOR:g}. Under torchrun the code is",
        "always its own, 1.",
        "",
        "The last words of the ranks:",
        "",
        *(f"- seed {r.seed}, {r.victim} killed: {r.said}" for r in rows if r.said),
        "",
    ]
    if missing := [f"{k.seed} ({k.setup}, {k.victim})" for k in PLAN if k.seed not in {r.seed for r in rows}]:
        lines += [f"Not measured yet: seeds {', '.join(missing)}.", ""]
    return "\n".join(lines)


def _size(difference: float) -> str:
    return f"{difference:.1e}" if difference else "none"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default=f"0-{len(PLAN) - 1}")
    parser.add_argument("--work", type=Path, default=Path("/tmp/rlalign-kills"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kills.md"))
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    log = given.work / "rows.jsonl"
    low, _, high = given.seeds.partition("-")
    for kill in PLAN[int(low) : int(high or low) + 1]:
        row = measure(kill, given.work)
        with log.open("a") as out:
            out.write(json.dumps(asdict(row)) + "\n")
        print(row, flush=True)
    rows = {row["seed"]: Row(**row) for row in map(json.loads, log.read_text().splitlines())}
    given.out.write_text(table([rows[seed] for seed in sorted(rows)]))
    return 0 if all(row.good() for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
