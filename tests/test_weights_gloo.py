"""weights.transport=gloo with real groups and worker processes, without engines: what arrives, and who is named otherwise."""

import os
import socket
from contextlib import closing

import pytest
import torch

from rlalign.weights import publish
from rlalign.weights.bucket import BufferBucket
from rlalign.weights.digest import digest
from rlalign.weights.wire_transport import WireTransport
from tests.workers import FileWorkers, GlooWorkers, model

A, B = "http://127.0.0.1:1", "http://127.0.0.1:2"


@pytest.fixture(scope="module")
def workers():
    with closing(GlooWorkers(A, B)) as workers:
        yield workers


def transport(*, bucket_bytes: int = 1000, timeout_s: float = 10.0, port: int = 0) -> WireTransport:
    return WireTransport("gloo", bucket_bytes=bucket_bytes, timeout_s=timeout_s, port=port)


@pytest.mark.slow
def test_every_worker_gets_every_bit_through_one_group(workers):
    weights, default = model(), torch.distributed.is_initialized()
    with closing(transport()) as wire:
        report = publish(weights.items(), 1, receiver=workers, transport=wire)
        group = wire._group
        assert (report.ranks, report.tensors) == (2, 42) and report.buckets > 30
        told = workers.ask("rlalign_finish", {"version": 1})
        assert {ack["fingerprint"] for ack in told} == {"".join(digest(t) for t in weights.values())}
        publish(model(seed=1).items(), 2, receiver=workers, transport=wire)
        assert wire._group is group and torch.distributed.is_initialized() is default  # a group of its own


@pytest.mark.slow
def test_the_trainer_holds_two_buckets(workers):
    """One being sent and one being filled, taken from a pool of two; a larger tensor has a bucket of its own."""
    with closing(transport(bucket_bytes=4000)) as wire:
        made = []
        empty = wire.empty
        wire.empty = lambda first: made.append(empty(first)) or made[-1]
        report = publish(model().items(), 1, receiver=workers, transport=wire)
        regular = {b.buffer.data_ptr() for b in made if b.buffer.numel() == 4000}
        large = [b for b in made if b.buffer.numel() > 4000]
        assert len(regular) == 2 and report.buckets == len(made) > 10
        assert large and all(len(b.entries) == 1 for b in large)


def test_a_tensor_starts_where_its_dtype_can_and_never_beyond_the_bucket():
    bucket = BufferBucket(torch.zeros(64, dtype=torch.uint8))
    bucket.add("odd", torch.ones(3, dtype=torch.bfloat16))
    wide = torch.arange(6, dtype=torch.float64)
    assert bucket.has_room("wide", wide) and not bucket.has_room("wide", torch.zeros(7, dtype=torch.float64))
    bucket.add("wide", wide)
    entry = bucket.entries[1]
    assert entry.start == 16 and torch.equal(entry.view(bucket.data), wide)
    assert entry.view(bucket.data).data_ptr() == bucket.buffer.data_ptr() + 16


@pytest.mark.slow
def test_damage_on_the_way_is_named_and_a_new_group_heals(workers):
    with closing(transport()) as wire:
        deliver, sent = wire.deliver, []

        def damaged(receiver, bucket):
            sent.append(bucket)
            if len(sent) == 5:
                bucket.buffer[bucket.entries[0].start] ^= 1
            return deliver(receiver, bucket)

        wire.deliver = damaged
        with pytest.raises(RuntimeError, match="its bytes are not those that were sent") as raised:
            publish(model().items(), 1, receiver=workers, transport=wire)
        assert A in str(raised.value) and B in str(raised.value) and wire._group is None
        wire.deliver = deliver
        assert publish(model().items(), 1, receiver=workers, transport=wire).ranks == 2


@pytest.mark.slow
def test_who_does_not_come_is_named_and_a_taken_port_too(workers):
    class Deaf(GlooWorkers):
        def __init__(self, workers):
            self.__dict__ |= vars(workers)

        def ask_each(self, method, args_of_engine):
            if method == "rlalign_join":
                self.engines = [A]
            try:
                return super().ask_each(method, args_of_engine[:1] if method == "rlalign_join" else args_of_engine)
            finally:
                self.engines = [A, B]

    words = f"not every worker came to 127.0.0.1:[0-9]+: {B}, rank 0 on here"
    with closing(transport(timeout_s=1.0)) as wire, pytest.raises(RuntimeError, match=words):
        publish(model().items(), 1, receiver=Deaf(workers), transport=wire)
    words = f"{socket.gethostname()} cannot open a store at 127.0.0.1:.*weights.port"
    with socket.create_server(("127.0.0.1", 0)) as taken, closing(transport(port=taken.getsockname()[1])) as wire:  # noqa: SIM117
        with pytest.raises(ValueError, match=words):
            publish(model().items(), 1, receiver=workers, transport=wire)
    with closing(transport()) as wire:
        assert publish(model().items(), 1, receiver=workers, transport=wire).ranks == 2


def test_an_engine_in_the_trainers_own_process_is_refused():
    class Embedded(FileWorkers):
        def ask(self, method, *args):
            return [
                answer | {"pid": os.getpid(), "host": socket.gethostname()} for answer in super().ask(method, *args)
            ]

    with (
        closing(transport()) as wire,
        pytest.raises(ValueError, match="use weights.transport=shared_memory, or rollout.backend"),
    ):
        publish(model().items(), 1, receiver=Embedded("embedded"), transport=wire)


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_is_named_and_the_others_go_on(workers):
    """Last: the worker stays dead."""

    def killing():
        for place, pair in enumerate(model().items()):
            if place == 30:
                workers.processes[B].kill()
                workers.processes[B].wait()
            yield pair

    with closing(transport(timeout_s=3.0)) as wire:
        with pytest.raises(
            RuntimeError, match=f"a bucket did not reach every worker: .*{B}, rank 0 on here: did not answer"
        ):
            publish(killing(), 2, receiver=workers, transport=wire)
        assert wire._group is None and workers.engines == [A] and workers.versions[A] != 2
        assert publish(model().items(), 2, receiver=workers, transport=wire).ranks == 1
