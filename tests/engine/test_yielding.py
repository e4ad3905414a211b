"""On CPU a process of vLLM that waits for another one sleeps soon, is woken by the message, and looks again without one."""

import threading
import time

import pytest
import zmq
from vllm.distributed.device_communicators import shm_broadcast

from rlalign.rollout.engine import own_process


@pytest.fixture
def reader_and_writer(tmp_path):
    address, context = f"ipc://{tmp_path}/notify", zmq.Context()
    own_process.yield_cores()
    writer = shm_broadcast.SpinCondition(is_reader=False, context=context, notify_address=address)
    reader = shm_broadcast.SpinCondition(is_reader=True, context=context, notify_address=address, busy_loop_s=60)
    while not reader.local_notify_socket.poll(20):  # a subscription takes a moment to be known
        writer.notify()
    reader.local_notify_socket.recv()
    yield reader, writer
    context.destroy(linger=0)


def test_a_wait_spins_for_a_moment_and_sleeps_after_it(reader_and_writer, monkeypatch):
    reader, _ = reader_and_writer
    spins = []
    monkeypatch.setattr(shm_broadcast, "sched_yield", lambda: spins.append(1))
    reader.last_read = time.monotonic() + 60  # just now, on the slowest machine too
    reader.wait()
    assert len(spins) == 1
    reader.last_read = time.monotonic() - 2 * own_process.SPIN_S  # vLLM itself would go on without a pause
    reader.wait()  # and returns although nobody tells
    assert len(spins) == 1


def test_who_sleeps_is_woken_by_the_message(reader_and_writer, monkeypatch):
    reader, writer = reader_and_writer
    monkeypatch.setattr(own_process, "LOOK_MS", 30_000)
    reader.last_read = time.monotonic() - 2 * own_process.SPIN_S
    woken = threading.Event()
    threading.Thread(target=lambda: (reader.wait(), woken.set()), daemon=True).start()
    writer.notify()
    assert woken.wait(20) and not reader.local_notify_socket.poll(0)
