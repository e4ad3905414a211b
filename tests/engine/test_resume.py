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
STEPS = 4
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
    assert process.wait(timeout=240) == 0, process.communicate()[0][-2000:]
    found = rows(folder)
    assert sorted(found) == list(range(STEPS))
    assert found[STEPS - 1]["reward/mean"] != found[0]["reward/mean"], "nothing was learnt, so nothing is proved"
    return found


def test_after_a_kill_at_a_random_moment_the_run_loses_nothing_that_was_saved(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    checkpoints = ("checkpoint.every=1", "checkpoint.resume=auto")
    process = start(folder, *checkpoints)
    wait_for(folder, 2, process)
    time.sleep(random.uniform(0.0, 0.5))  # somewhere in a later step, or in its checkpoint
    process.kill()
    process.wait()
    done = max(int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-*"))
    again = start(folder, *checkpoints)
    assert again.wait(timeout=240) == 0, again.communicate()[0][-2000:]
    assert rows(folder) == uninterrupted
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert any(f"goes on after step {done}, policy version {done + 1}" in e["message"] for e in events)


def test_a_signal_ends_the_run_after_a_whole_saved_step_and_asks_for_a_requeue(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, "checkpoint.resume=auto")
    wait_for(folder, 1, process)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 75, out[-2000:]
    assert "SIGUSR1: step" in out and "checkpoint.resume=auto goes on from it" in out
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    changed = start(folder, "checkpoint.resume=must", "algo.lr=1e-5")
    out, _ = changed.communicate(timeout=240)
    assert changed.returncode == 2 and "made with another configuration (algo.lr: " in out
    again = start(folder, "checkpoint.resume=must")
    assert again.wait(timeout=240) == 0, again.communicate()[0][-2000:]
    assert rows(folder) == uninterrupted


def test_when_the_engines_own_process_is_killed_both_ranks_end_and_say_so(tmp_path):
    """vLLM's client would wait for its answer for ever; the first rank in it, and the second one in a broadcast."""
    run = Run(tmp_path / "run", "2 ranks")
    try:
        while not run.victims("engine") or not rows(run.folder):
            assert run.process.poll() is None, run.words()[-2000:]
            time.sleep(0.05)
        os.kill(run.victims("engine")[0], signal.SIGKILL)
        assert run.process.wait(timeout=90) != 0
        assert "the rollout engine died" in run.words() and "ended with code -9" in run.words()
        until = time.monotonic() + 20
        while run.pids() and time.monotonic() < until:
            time.sleep(0.1)
        assert not run.pids()
    finally:
        run.clean()
