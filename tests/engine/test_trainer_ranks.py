"""Two trainer ranks are one trainer: the same logprobs, gradients and weights as one rank, for every ZeRO stage."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.conftest import on_two_ranks
from tests.engine.updates import RANK_CASES, plain_loop, run_case


@pytest.fixture(scope="module")
def two_ranks(untied, tmp_path_factory) -> Path:
    return on_two_ranks("tests.engine.updates", untied, tmp_path_factory.mktemp("ranks"))


def result(folder: Path, name: str) -> dict:
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("name", RANK_CASES)
def test_two_ranks_equal_one(two_ranks, untied, name):
    two, one = result(two_ranks, name), run_case(untied, name)
    exact = RANK_CASES[name][0] == "float32"
    assert torch.equal(two["weights"], one["weights"])
    assert (two["logprobs"] - one["logprobs"]).abs().max() < (1e-5 if exact else 0.05)
    if RANK_CASES[name][1]:  # stage 0 clips by the norm without telling it
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


def test_packed_rows_equal_padded_ones(two_ranks):
    """Other micro-batches, other ZeRO stage, checkpointing, two ranks: the same logprobs, gradients and weights."""
    for packed, padded, floor in (
        ("zero0-packed", "zero1", 1e-6),
        ("zero2-packed", "zero2", 1e-6),
        ("zero3-packed-checkpointing-kl", "zero3-checkpointing-kl", 1e-6),
        ("zero1-packed-bf16", "zero1-bf16", 2e-3),
    ):
        mine, theirs = result(two_ranks, packed), result(two_ranks, padded)
        largest = float(theirs["logprobs"].abs().max())  # a logprob is a difference of numbers about as large
        assert float((mine["logprobs"] - theirs["logprobs"]).abs().max()) <= floor * max(1.0, largest)
        if RANK_CASES[packed][1]:
            # of the steps after the first, whose weights already differ by rounding
            assert mine["norms"] == pytest.approx(theirs["norms"], rel=10 * floor)
        assert float((mine["moved"] - theirs["moved"]).abs().mean()) < 10 * floor * float(theirs["moved"].abs().mean())


def test_a_partitioned_policy_saves_an_ordinary_folder(two_ranks, untied):
    saved = AutoModelForCausalLM.from_pretrained(two_ranks / "saved", dtype=torch.float32).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32).state_dict().items():
        assert torch.equal(saved[name], weight), name


def test_a_batch_that_cannot_be_shared_evenly_is_refused_on_every_rank(two_ranks):
    for rank in (0, 1):
        message = (two_ranks / f"uneven-{rank}.txt").read_text()
        assert "5 sequences cannot be divided evenly among 2 trainer ranks" in message
