"""Ranks that do not belong together are told so, each with its host and a remedy, before any collective could hang."""

import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlalign import ranks
from rlalign.ranks import free_port
from rlalign.run import joining
from rlalign.run.joining import Launched, meet, programs

ROOT = Path(__file__).parents[1]
HOST = socket.gethostname()
PROGRAMS = {"torch": "2.13.0", "rlalign": "0.1.0 (abc)"}


@pytest.fixture
def said(monkeypatch):
    """What ranks say that try to meet, each in a thread: (rank, size[, programs]) of each."""

    def ask(*given: tuple, patience: float = 30.0, port: int | None = None) -> list[str]:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port or free_port()))

        def one(rank: int, size: int, own: dict[str, str] = PROGRAMS) -> str:
            address = f"127.0.0.1:{os.environ['MASTER_PORT']}"
            try:
                stores.append(meet(Launched(rank=rank, local_rank=0, size=size, address=address), own, patience))
            except (ValueError, RuntimeError) as error:
                return f"{type(error).__name__}: {error}"
            return "met"

        stores: list = []
        with ThreadPoolExecutor(len(given)) as pool:
            return list(pool.map(lambda words: one(*words), given))

    return ask


def test_ranks_with_the_same_programs_meet_and_others_are_told_which_host_has_what(said):
    assert said((0, 3), (1, 3), (2, 3)) == ["met", "met", "met"]
    older = PROGRAMS | {"torch": "2.12.1"}
    for answer in said((0, 2), (1, 2, older)):
        assert answer.startswith(
            f"ValueError: the trainer ranks run different programs. Rank 0 on {HOST}: torch 2.13.0"
        )
        assert f"rank 1 on {HOST}: torch 2.12.1. Install the same" in answer


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named_with_where_it_was_expected(said):
    (alone,) = said((0, 2), patience=1.0)
    assert f"RuntimeError: rank 0 of 2 on {HOST} did not meet the others at 127.0.0.1:" in alone
    assert "were 2 ranks started (WORLD_SIZE)" in alone


def test_a_taken_port_is_named_with_its_host(said):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (blocked,) = said((0, 2), patience=1.0, port=port)
    assert f"rank 0 of 2 on {HOST} cannot listen on 127.0.0.1:{port}" in blocked and "another MASTER_PORT" in blocked


@pytest.mark.slow
def test_two_processes_with_one_rank_are_told_apart(said):
    answers = said((0, 3), (1, 3), (1, 3), patience=1.0)
    assert sum(f"ValueError: rank 1 of 3 on {HOST}: another process has this RANK already" in a for a in answers) == 1


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, f"{HOST}: WORLD_SIZE='two' is no number"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK=2 with WORLD_SIZE=2"),
    ],
)  # fmt: skip
def test_a_launchers_variables_that_do_not_fit_together(monkeypatch, variables, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="torchrun, deepspeed or srun") as caught:
        Launched.from_environment()
    assert message in str(caught.value)


def test_the_programs_name_the_bytes_of_rlalign(monkeypatch, tmp_path):
    copy = tmp_path / "rlalign"
    copy.mkdir()
    shutil.copy(ROOT / "rlalign" / "exits.py", copy)
    monkeypatch.setattr(joining, "__file__", str(copy / "run" / "joining.py"))
    before = programs()
    (copy / "exits.py").write_text((copy / "exits.py").read_text() + "\n")
    assert programs()["rlalign"] != before["rlalign"] and programs()["torch"] == before["torch"]


def test_a_closed_connection_is_told_as_the_end_of_another_rank(monkeypatch):
    error = RuntimeError(
        "[pair.cc:553] Connection closed by peer [127.0.0.1]:55002. This is typically caused by ...\nmore"
    )
    assert ranks.explained(error) == str(error)  # one process has no other rank
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    assert "another trainer rank ended, and its own log says why ([pair.cc:553] Connection closed" in ranks.explained(
        error
    )
    assert ranks.explained(RuntimeError("out of tokens")) == "out of tokens"
