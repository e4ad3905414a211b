"""publish() on its own: digests, refusals before anything is suspended, and what a killed process left behind."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from rlalign.weights import digest, publish
from tests.fakes import FakeEngine

WEIGHTS = [("w", torch.ones(2, 2))]


def test_equal_bytes_have_equal_digests_and_one_bit_changes_them():
    weight = torch.randn(33, 7).bfloat16()
    assert digest(weight) == digest(weight.clone()) == digest(weight.t().contiguous().t())
    changed = weight.clone()
    changed.view(torch.int16)[3, 3] ^= 1
    assert digest(changed) != digest(weight)


def test_what_cannot_be_published_is_refused_and_generation_goes_on(tmp_path):
    events: list = []
    engine = FakeEngine(events)
    with pytest.raises(ValueError, match="is no folder"):
        publish(WEIGHTS, 1, receiver=engine, shared=tmp_path / "nowhere")
    assert events == [] and engine.refusal is None
    with pytest.raises(ValueError, match="offered no weights"):
        publish([], 1, receiver=engine, shared=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_copies_of_dead_processes_are_removed_and_those_of_living_ones_are_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    host = socket.gethostname()
    left = tmp_path / f"rlalign-weights-{host}-{dead.pid}-x"
    living = tmp_path / f"rlalign-weights-{host}-{os.getppid()}-x"
    elsewhere = tmp_path / f"rlalign-weights-other-{host}-{dead.pid}-x"
    for folder in (left, living, elsewhere):
        folder.mkdir()
    publish(WEIGHTS, 1, receiver=FakeEngine([]), shared=tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([living, elsewhere])
