"""One start of a short run that can be killed: its processes, what it was doing, what it wrote. Used by kills.py.

Run as a program it is `rlalign`, but for writing its stack where it is asked to.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from rlalign.ranks import environment_without_launcher

ROOT = Path(__file__).parents[1]
STEPS = 6
LIMIT = 240.0  # seconds after which a run counts as hung
SERVER = "vllm.entrypoints.openai.api_server"
TIMED = ("time/", "seconds", "publish/seconds", "publish/carry_seconds", "rollout/tokens_per_s")
DEMO = (
    "--config-name", "demo", f"steps={STEPS}", "rollout.prompts_per_step=8", "task.eval_size=16", "model.dtype=float32",
    "overwrite=false", "tracking.wandb=offline", "checkpoint.every=1", "checkpoint.resume=auto",
)  # fmt: skip


SETUPS = {  # trainer ranks, and what is said beside DEMO. More than one rank: vLLM in a process of its own
    "1 rank": (1, ()),
    "2 ranks": (2, ()),
    "2 ranks, 2 servers": (2, ("rollout.backend=server", "rollout.start=2")),
}


class Run:
    """One start of a run: its processes, and what is in its folder."""

    def __init__(self, folder: Path, setup: str) -> None:
        self.folder, self.stacks = folder, folder.with_name(f"{folder.name}-stacks")
        self.stacks.mkdir(parents=True, exist_ok=True)
        self._servers: set[int] = set()
        ranks, more = SETUPS[setup]
        environment = environment_without_launcher()
        environment |= {"KILLS_STACKS": str(self.stacks), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command += [str(Path(__file__)), "train", *DEMO, *more, f"output_dir={folder}"]
        self.began = time.monotonic()
        self._log = self.stacks / f"output-{time.time_ns()}.txt"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def age(self) -> float:
        return time.monotonic() - self.began

    def wait(self) -> int | None:
        """The exit code, or None when it is still running after the limit."""
        try:
            return self.process.wait(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return None

    def pids(self) -> dict[int, str]:
        """Living processes of this start: pid -> command line.

        Found by session: the launcher's, those that torchrun gives its ranks, and those that the ranks give their servers.
        """
        ranks = {int(file.stem.split("-")[2]) for file in self.stacks.glob("rank-*.txt")}
        found: dict[int, tuple[int, int, str]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    state, parent, _, session, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if state != "Z":
                    found[int(entry.name)] = (int(parent), int(session), line)
        self._servers |= {pid for pid, (parent, _, line) in found.items() if parent in ranks and SERVER in line}
        sessions = {self.process.pid} | ranks | self._servers
        return {pid: line for pid, (_, session, line) in found.items() if session in sessions}

    def trainer(self, rank: int) -> int | None:
        """The process of a trainer rank, once it has begun to write its stack file."""
        for file in self.stacks.glob(f"rank-{rank}-*.txt"):
            pid = int(file.stem.split("-")[2])
            if Path("/proc", str(pid)).exists():
                return pid
        return None

    def victims(self, name: str) -> list[int]:
        """Whom to kill; empty while there is no such process yet."""
        if name in ("trainer", "rank 1"):
            pid = self.trainer(1 if name == "rank 1" else 0)
            return [] if pid is None else [pid]
        start, count = {"engine": ("VLLM::EngineCor", 1), "server": (SERVER, 1), "both servers": (SERVER, 2)}[name]
        found = [pid for pid, line in self.pids().items() if start in line]
        return found[:count] if len(found) >= count else []

    def doing(self) -> str:
        """Asks rank 0 for its stack: the phase, and the innermost function of ours."""
        pid = self.trainer(0)
        if pid is None:
            return "start-up (Python itself)"
        os.kill(pid, signal.SIGUSR2)
        time.sleep(0.02)
        (file,) = self.stacks.glob(f"rank-0-{pid}.txt")
        return phase_of(file.read_text())

    def words(self) -> str:
        return self._log.read_text()

    def last_words(self) -> str:
        """What the ranks of this start said as they ended, each sentence once, without those that repeat rank 0's."""
        said = [line.strip() for line in self.words().splitlines() if line.startswith("rlalign: ")]
        own = [line for line in said if not line.startswith("rlalign: rank 0 stopped the run")]
        return " / ".join(f"`{line}`" for line in dict.fromkeys(own))

    def clean(self) -> int:
        """Kill what is left of this start and say how many processes that was."""
        left = self.pids()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return len(left)


PHASES = (
    ("_save", "checkpoint"), ("restore", "restore"), ("publish_from_ranks", "publish"), ("publish", "publish"),
    ("evaluate", "evaluation"), ("generate", "rollout"), ("score", "score"), ("forward_backward", "train"),
    ("optim_step", "train"), ("log_step", "logging"), ("_summary", "end"), ("write_report", "end"), ("finish", "end"),
    ("close", "end"),
)  # fmt: skip


def phase_of(stack: str) -> str:
    """From a dump of faulthandler: where a run was, and in which function of rlalign."""
    frames = re.findall(r'File ".*?([\w/]+)\.py", line \d+ in (\w+)', stack)
    ours = [(file, name) for file, name in frames if "rlalign/" in file]
    names = {name for _, name in ours}
    phase = next((phase for name, phase in PHASES if name in names), "step" if "run_all" in names else "start-up")
    return f"{phase} ({ours[0][0].rpartition('rlalign/')[2]}.{ours[0][1]})" if ours else "start-up (imports)"


def rows_of(folder: Path) -> dict[int, dict]:
    """The last row of every step, without what a clock wrote."""
    file, found = folder / "metrics.jsonl", {}
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""  # the last line may be half written
    for line in whole.splitlines():
        row = json.loads(line)
        found[row["step"]] = {k: v for k, v in row.items() if not k.startswith(TIMED)}
    return found


def checkpoint_of(folder: Path) -> int:
    """The newest whole checkpoint's step; -1 without one."""
    return max((int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-*")), default=-1)


def wandb_id(folder: Path) -> str | None:
    file = folder / "run.json"
    return json.loads(file.read_text())["wandb"]["id"] if file.exists() else None


def main() -> int:
    """A trainer rank that writes its stack when it is asked to (SIGUSR2), in C, whatever it is doing."""
    rank = os.environ.get("RANK", "0")
    file = Path(os.environ["KILLS_STACKS"], f"rank-{rank}-{os.getpid()}.txt").open("w")  # noqa: SIM115  as long as the process
    faulthandler.register(signal.SIGUSR2, file=file, all_threads=False)
    from rlalign.cli import main as rlalign

    return rlalign(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
