"""A run that is killed and started again gives the numbers of one that was not: bit for bit, on this engine."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.kills_run import Run
from rlalign.ranks import environment_without_launcher

ROOT = Path(__file__).parents[2]
STEPS = 8
TIMED = ("time/", "seconds", "publish/seconds", "publish/carry_seconds", "rollout/tokens_per_s")


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    environment = environment_without_launcher()
    command = [sys.executable, "-m", "rlalign.cli", "train", "--config-name", "demo", f"output_dir={folder}"]
    small = [f"steps={STEPS}", "rollout.prompts_per_step=8", "task.eval_size=16", "tracking.wandb=disabled"]
    return subprocess.Popen(
        [*command, *small, *overrides], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


def rows(folder: Path) -> dict[int, dict]:
    """The last row of every step, without what a clock wrote."""
    found = {}
    file = folder / "metrics.jsonl"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""  # the last line may be half written
    for line in whole.splitlines():
        row = json.loads(line)
        found[row["step"]] = {k: v for k, v in row.items() if not k.startswith(TIMED)}
    return found


def wait_for(folder: Path, count: int, process: subprocess.Popen) -> None:
    while len(rows(folder)) < count:
        assert process.poll() is None, process.communicate()[0][-2000:]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = start(folder)
    assert process.wait(timeout=900) == 0, process.communicate()[0][-2000:]
    found = rows(folder)
    assert sorted(found) == list(range(STEPS))
    assert found[STEPS - 1]["reward/mean"] != found[0]["reward/mean"], "nothing was learnt, so nothing is proved"
    return found


def test_a_run_that_was_killed_and_then_preempted_gives_the_numbers_of_one_that_was_neither(uninterrupted, tmp_path):
    """Killed somewhere in a step or in its checkpoint; gone on with, and asked to end, which it does saved; gone on with again."""
    folder = tmp_path / "run"
    killed = start(folder, "checkpoint.every=1", "checkpoint.resume=auto")
    wait_for(folder, 2, killed)
    time.sleep(random.uniform(0.0, 0.3))
    killed.kill()
    killed.wait()
    done = max(int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-*"))
    before = len((folder / "metrics.jsonl").read_text().splitlines())

    asked = start(folder, "checkpoint.resume=auto")  # which saves nothing unless it is asked to end
    while len((folder / "metrics.jsonl").read_text().splitlines()) <= before:
        assert asked.poll() is None, asked.communicate()[0][-2000:]
        time.sleep(0.02)
    asked.send_signal(signal.SIGUSR1)
    out, _ = asked.communicate(timeout=900)
    assert asked.returncode == 75, out[-2000:]
    assert "SIGUSR1: step" in out and "checkpoint.resume=auto goes on from it" in out
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"

    changed = start(folder, "checkpoint.resume=must", "algo.lr=1e-5")
    out, _ = changed.communicate(timeout=900)
    assert changed.returncode == 2 and "made with another configuration (algo.lr: " in out

    again = start(folder, "checkpoint.resume=must")
    assert again.wait(timeout=900) == 0, again.communicate()[0][-2000:]
    assert rows(folder) == uninterrupted
    events = [json.loads(line)["message"] for line in (folder / "events.jsonl").read_text().splitlines()]
    went_on = [message for message in events if message.startswith("goes on after step")]
    assert len(went_on) == 2 and went_on[0] == f"goes on after step {done}, policy version {done + 1}"


@pytest.mark.nightly  # benchmarks/kills.py kills every process of every kind of run
def test_when_the_engines_own_process_is_killed_both_ranks_end_and_say_so(tmp_path):
    """vLLM's client would wait for its answer for ever; the first rank in it, and the second one in a broadcast."""
    run = Run(tmp_path / "run", "2 ranks")
    try:
        while not run.victims("engine") or not rows(run.folder):
            assert run.process.poll() is None, run.words()[-2000:]
            time.sleep(0.05)
        os.kill(run.victims("engine")[0], signal.SIGKILL)
        assert run.process.wait(timeout=600) != 0
        assert "the rollout engine died" in run.words() and "ended with code -9" in run.words()
        until = time.monotonic() + 300
        while run.pids() and time.monotonic() < until:
            time.sleep(0.1)
        assert not run.pids()
    finally:
        run.clean()
