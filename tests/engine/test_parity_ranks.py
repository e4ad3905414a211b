"""rlalign parity over two tensor-parallel ranks, as the command is started."""

import json
import subprocess
import sys

import pytest

from tests.engine.test_tensor_parallel import environment


@pytest.mark.nightly
def test_two_ranks(untied, tmp_path):
    file = tmp_path / "parity.json"
    command = [sys.executable, "-m", "rlalign.cli", "parity", "--tensor-parallel", "2", "--body", "float32"]
    command += ["--prompts", "4", "--json", str(file), f"model.path={untied}", "rollout.group_size=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(file.read_text())["rows"]
    assert {r["tensor_parallel"] for r in rows} == {2} and all(r["k3"] < 1e-9 for r in rows)
