"""The command lines that slurm/ composes, by programs that only write down how they were called.

Pyxis is a plugin of srun and apptainer a program of its own; where neither is installed this is as far as a test can go. What
runs without a container is submitted to a real Slurm in tests/slurm/.
"""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORD = """#!/bin/bash
line=$(printf '%q ' "$(basename "$0")" "$@"); echo "$line" >> {log}
case $line in *server.sh*) for i in $(seq 100); do sleep 0.1; done;; *rank.sh*) sleep 0.3;; esac
"""
HOSTS = '#!/usr/bin/env bash\n[ "$1" = show ] && printf "%s\\n" {hosts}\nexit 0\n'


@pytest.fixture
def call(tmp_path):
    """Run a file of slurm/ as Slurm would on the first node; returns what srun and module were called with."""
    log, programs = tmp_path / "calls", tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")

    def program(name: str, text: str) -> None:
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(file: str, *words: str, hosts: str = "n1", **variables: str) -> list[list[str]]:
        for name in ("srun", "module", "rlalign"):
            program(name, RECORD.format(log=log))
        program("scontrol", HOSTS.format(hosts=hosts))
        given = {
            "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_NAME": "r", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x", "SLURM_NTASKS_PER_NODE": "8",
        }  # fmt: skip
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RLALIGN"))}
        done = subprocess.run(
            ["bash", str(ROOT / "slurm" / file), *words],
            env=kept | given | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return [shlex.split(line) for line in log.read_text().splitlines()]

    return run


def test_pyxis_gets_the_image_and_the_folder_as_options_of_srun(call, tmp_path):
    image = {"RLALIGN_CONTAINER": "/images/rlalign.sqsh", "RLALIGN_MOUNTS": "/models:/models,/d:/data"}
    ((_, *words),) = call("single_node.sbatch", "a=1", **image)
    command = words.index("bash")
    assert words[command - 6 : command] == [
        *("--container-image", "/images/rlalign.sqsh"),
        *("--container-mounts", f"{tmp_path}:{tmp_path},/models:/models,/d:/data"),
        *("--container-workdir", str(tmp_path)),
    ]
    assert words[command + 1 :][:2] == [f"{tmp_path}/slurm/rank.sh", "a=1"]


def test_apptainer_runs_inside_every_task(call, tmp_path):
    ((_, *words),) = call("single_node.sbatch", "a=1", RLALIGN_CONTAINER="/images/rlalign.sif")
    assert not any("container" in word for word in words)
    inside = words.index("apptainer")
    assert words[inside:][:8] == [
        *("apptainer", "exec", "--nv", "--bind", f"{tmp_path}:{tmp_path}", "--pwd", str(tmp_path), "/images/rlalign.sif")
    ]  # fmt: skip
    assert words[inside + 8 :][:3] == ["bash", f"{tmp_path}/slurm/rank.sh", "a=1"]


def test_modules_are_loaded_in_their_order_before_anything_runs(call):
    calls = call("single_node.sbatch", RLALIGN_MODULES="gcc/12 cuda/12.8")
    assert [words[:3] for words in calls[:2]] == [["module", "load", "gcc/12"], ["module", "load", "cuda/12.8"]]
    assert calls[2][0] == "srun"


def test_servers_get_the_last_nodes_and_their_share_of_the_gpus(call):
    calls = call(
        "multi_node.sbatch", "a=1", hosts="n1 n2 n3 n4 n5", RLALIGN_SERVER_NODES="2", RLALIGN_SERVERS_PER_NODE="4",
        SLURM_GPUS_PER_NODE="h100:8", SLURM_CPUS_PER_TASK="12",
    )  # fmt: skip
    servers = next(words for words in calls if any("server.sh" in word for word in words))
    trainers = next(words for words in calls if any("rank.sh" in word for word in words))
    assert {"--nodes=3", "--ntasks=24", "--nodelist=n1,n2,n3", "--kill-on-bad-exit=1", "--cpus-per-task=12"} <= set(
        trainers
    )
    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--nodelist=n4,n5", "--gpus-per-task=2"} <= set(servers)
    assert "--kill-on-bad-exit=1" not in servers, "one dead server would end them all"
    assert "--cpus-per-task=12" not in servers, "a server may use its whole share of the node"
    assert "rollout.wait_for=8" in trainers and "rollout.wait_for=8" in servers


def test_a_transport_that_was_chosen_is_kept(call):
    calls = call("multi_node.sbatch", "weights.transport=nccl", hosts="n1 n2", RLALIGN_SERVER_NODES="1")
    words = next(words for words in calls if any("rank.sh" in word for word in words))
    assert [word for word in words if word.startswith("weights.")] == ["weights.transport=nccl"]
