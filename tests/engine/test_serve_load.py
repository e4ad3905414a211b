"""Real servers under load: nothing lost, crossed or leaked; after kill -9 errors and never wrong scores.

Shorter runs of benchmarks/serve_load.py, whose long ones are in benchmarks/results/serve.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"


def run(folder: Path, mode: str, *options: str) -> dict:
    command = [sys.executable, str(SCRIPT), mode, "--json", str(folder / "found.json"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.nightly
def test_two_hundred_clients_get_their_own_answers_and_memory_stays(tmp_path):
    found = run(tmp_path, "load", "--clients", "200", "--seconds", "10")
    assert (found["wrong"], found["lost"], found["failed"], found["exit_code"]) == (0, 0, {}, 0), found
    assert found["requests"] > 200
    middle, end = found["rss_mib"]
    assert end < middle + 40, found  # activations come and go; a leak of 25 KiB a request would show


def test_kill_9_gives_errors_and_never_a_wrong_score(tmp_path):
    found = run(tmp_path, "kill", "--clients", "50", "--seconds", "6")
    assert (found["wrong"], found["lost"], found["exit_code"]) == (0, 0, -9), found
    assert set(found["failed"]) == {"0"}, found
    assert found["before"] > 50, found
    assert found["after"] > 50, found
