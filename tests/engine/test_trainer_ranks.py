"""Two trainer ranks are one trainer: the same logprobs, gradients and weights as one rank, for every ZeRO stage."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlalign.ranks import environment_without_launcher
from tests.engine.updates import RANK_CASES, plain_loop, run_case

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two_ranks(untied, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = environment_without_launcher() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "tests.engine.updates", str(untied), str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def result(folder: Path, name: str) -> dict:
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("name", RANK_CASES)
def test_two_ranks_equal_one(two_ranks, untied, name):
    two, one = result(two_ranks, name), run_case(untied, name)
    exact = RANK_CASES[name][0] == "float32"
    assert torch.equal(two["weights"], one["weights"])
    assert (two["logprobs"] - one["logprobs"]).abs().max() < (1e-5 if exact else 0.05)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-4 if exact else 0.02)
    for mine, theirs in zip(two["metrics"], one["metrics"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3 if exact else 0.05, abs=1e-5 if exact else 1e-2)
    moved = float(one["moved"].abs().mean())
    assert float((two["moved"] - one["moved"]).abs().mean()) < (2e-3 if exact else 0.1) * moved


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_two_ranks_equal_the_plain_loop(two_ranks, untied, name):
    norms, moved = plain_loop(untied)
    two = result(two_ranks, name)
    assert two["norms"] == pytest.approx(norms, rel=1e-4)
    assert float((two["moved"] - moved).abs().mean()) < 2e-3 * float(moved.abs().mean())


def test_a_partitioned_policy_saves_an_ordinary_folder(two_ranks, untied):
    saved = AutoModelForCausalLM.from_pretrained(two_ranks / "saved", dtype=torch.float32).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32).state_dict().items():
        assert torch.equal(saved[name], weight), name


def test_a_batch_that_cannot_be_shared_evenly_is_refused_on_every_rank(two_ranks):
    for rank in (0, 1):
        message = (two_ranks / f"uneven-{rank}.txt").read_text()
        assert "5 sequences cannot be divided evenly among 2 trainer ranks" in message
