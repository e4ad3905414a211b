"""What a checkpoint of a run holds beside the policy: the random states of a rank, and where a start was when it was killed."""

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlalign import cli, exits
from rlalign.run.checkpointing import RandomStates
from rlalign.tracking import run_directory
from rlalign.tracking.run_directory import Run

ROOT = Path(__file__).parents[1]


def draws() -> tuple:
    return (
        random.random(),
        random.gauss(0, 1),
        np.random.normal(),
        int(np.random.randint(1 << 30)),
        torch.rand(3).tolist(),
    )


def test_every_generator_draws_on_from_where_it_was(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    draws()  # gauss and normal keep a second number back
    RandomStates().save_state(tmp_path / "random")
    expected = draws()
    assert draws() != expected
    RandomStates().load_state(tmp_path / "random")
    assert draws() == expected


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", range(6))
def test_a_start_killed_at_any_of_its_writes_does_not_block_the_next(tmp_path, monkeypatch, after):
    """The files of a run appear one by one; whichever were there, the same command starts again."""
    writes = 0

    def write_then_die(path, data):
        nonlocal writes
        if writes == after:
            raise Killed
        writes += 1
        original(path, data)

    original = run_directory.files.write_atomic
    arguments = {"config": {"seed": 0}, "wandb_mode": "disabled", "project": "p", "name": "n", "overwrite": True}
    with monkeypatch.context() as patch:
        patch.setattr(run_directory.files, "write_atomic", write_then_die)
        try:
            first = Run(tmp_path / "run", **arguments)
        except Killed:
            first = None
    if first is not None:
        first._lock.close()  # as the kernel does for a killed process
    second = Run(tmp_path / "run", **arguments)
    with second:
        second.log(0, {"reward/mean": 1.0})
        second.finish({})


@pytest.mark.parametrize(
    "error, code",
    [
        (exits.Lost("x"), exits.LOST),
        (exits.Preempted("x"), exits.REQUEUE),
        (RuntimeError("x"), 1),
        (ValueError("x"), 2),
    ],
)
def test_the_exit_code_says_whether_to_start_again(monkeypatch, error, code):
    def run(arguments):
        raise error

    monkeypatch.setattr(
        cli, "parser", lambda: SimpleNamespace(parse_known_args=lambda argv: (SimpleNamespace(run=run), []))
    )
    assert cli.main([]) == code


def test_the_jobs_of_slurm_know_the_same_codes():
    assert f"LOST={exits.LOST} REQUEUE={exits.REQUEUE} # rlalign/exits.py" in (ROOT / "slurm" / "job.sh").read_text()
