"""An engine's process and its trainer: neither outlives the other unnoticed, and the environment is as it was."""

import multiprocessing
import os
import signal
import time

import pytest

from rlalign.rollout.engine import own_process
from rlalign.rollout.engine.own_process import EngineProcesses

SPAWN = multiprocessing.get_context("spawn")
PATIENCE_S = 120.0


def sleeps(follows: bool, ready) -> None:
    if follows:
        own_process.end_with_parent()
    ready.put(os.getpid())
    time.sleep(10 * PATIENCE_S)


def trainer(pids) -> None:
    """Starts a process that follows it and one that was started for something else, and waits to be killed."""
    processes = EngineProcesses()
    with processes.starting(True):
        SPAWN.Process(target=sleeps, args=(True, pids)).start()
    SPAWN.Process(target=sleeps, args=(True, pids)).start()  # outside: its environment does not ask for it
    time.sleep(10 * PATIENCE_S)


def alive(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_an_engine_ends_with_its_killed_trainer_and_nothing_else_does():
    pids = SPAWN.Queue()
    parent = SPAWN.Process(target=trainer, args=(pids,))
    parent.start()
    children = {pids.get(timeout=PATIENCE_S), pids.get(timeout=PATIENCE_S)}
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    end = time.monotonic() + PATIENCE_S
    while all(map(alive, children)):
        assert time.monotonic() < end, "the engine outlived its trainer"
        time.sleep(0.05)
    (other,) = filter(alive, children)
    os.kill(other, signal.SIGKILL)


@pytest.mark.slow
def test_an_answer_that_a_killed_process_will_never_give_is_not_waited_for():
    processes = EngineProcesses()
    ready = SPAWN.Queue()
    with processes.starting(True):
        process = SPAWN.Process(target=sleeps, args=(False, ready), name="EngineCore")
        process.start()
    assert processes.watch(ready.get) == process.pid
    with pytest.raises(TimeoutError, match="its own"):
        processes.watch(lambda: (_ for _ in ()).throw(TimeoutError("its own")))
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=rf"EngineCore \(pid {process.pid}\) ended with code -9"):
        processes.watch(lambda: time.sleep(10 * PATIENCE_S))


def test_the_environment_is_put_back_and_an_engine_without_a_process_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    processes = EngineProcesses()
    with pytest.raises(RuntimeError, match="started no process"), processes.starting(True):
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and "VLLM_WORKER_MULTIPROC_METHOD" not in os.environ
    with processes.starting(False):
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert not processes and processes.watch(lambda: 3) == 3
