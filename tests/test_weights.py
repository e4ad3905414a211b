"""publish() without engines: buckets and their bounds, digests, and what is left behind by everything that can go wrong."""

import os
import resource
import socket
import subprocess
import sys
import threading
import time
import weakref

import blake3
import pytest
import torch
from safetensors.torch import load_file

from rlalign.config import WeightsConfig, load
from rlalign.weights import digest, open_transport, publish, publish_from_ranks
from rlalign.weights.file_transport import FileBucket, FileTransport, read
from tests.fakes import FakeEngine
from tests.workers import FileWorkers, model

WEIGHTS = [("w", torch.ones(2, 2))]
A, B = "http://a:8000", "http://b:8000"


def test_a_digest_is_blake3_of_the_bytes_and_one_bit_changes_it():
    weight = torch.randn(33, 7).bfloat16()
    assert digest(weight) == blake3.blake3(weight.view(torch.uint8).numpy().tobytes()).hexdigest()[:32]
    assert digest(weight) == digest(weight.t().contiguous().t())
    changed = weight.clone()
    changed.view(torch.int16)[3, 3] ^= 1
    assert digest(changed) != digest(weight)


@pytest.mark.parametrize("kind", ["shared_memory", "folder"])
@pytest.mark.parametrize("size", [1, 1000, 10**6])
def test_every_worker_gets_every_tensor(tmp_path, kind, size):
    weights, workers = model(), FileWorkers(A, B)
    transport = FileTransport(tmp_path, bucket_bytes=size, durable=kind == "folder")
    report = publish(weights.items(), 3, receiver=workers, transport=transport)
    for held in workers.held.values():
        assert list(held) == list(weights)
        assert all(torch.equal(held[n], t) and held[n].dtype == t.dtype for n, t in weights.items())
    assert (report.ranks, report.tensors) == (2, len(weights)) and report.bytes == sum(
        t.nbytes for t in weights.values()
    )
    assert report.buckets == {1: 41, 1000: report.buckets, 10**6: 1}[size] and list(tmp_path.iterdir()) == []
    assert workers.events[-3:] == ["finish", "finish", "acknowledge"]


def test_a_bucket_is_a_safetensors_file(tmp_path):
    weights = model()
    bucket = FileBucket(tmp_path / "b.safetensors", 10**6, str)
    for name, tensor in weights.items():
        bucket.add(name, tensor)
    bucket.seal(durable=False)
    found = load_file(tmp_path / "b.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[n], t) for n, t in weights.items())


def test_neither_the_trainer_nor_the_folder_ever_holds_more_than_stated(tmp_path):
    """One tensor in the trainer beside the one being made; two buckets in the folder, or two of the largest tensors."""
    bucket, large = 64 * 2**10, 100 * 2**10
    alive: list[weakref.ref] = []
    seen, kept = [], []

    def offered():
        for i in range(40):
            tensor = torch.full((large if i == 20 else 10 * 2**10,), i, dtype=torch.uint8)
            alive.append(weakref.ref(tensor))
            yield f"w{i}", tensor
            del tensor
            seen.append(
                sum(f.stat().st_size - 8 - 2**16 for f in tmp_path.rglob("bucket*") if f.stat().st_size > 2**16)
            )
            kept.append(sum(ref() is not None for ref in alive))

    workers = FileWorkers(A, spoil=lambda *_: time.sleep(0.005) or [])
    publish(offered(), 1, receiver=workers, transport=FileTransport(tmp_path, bucket_bytes=bucket))
    assert max(seen) <= bucket + large and max(kept) <= 1
    assert sum(seen) / len(seen) < 2 * bucket


def test_the_first_bucket_is_filled_while_the_workers_are_suspended_and_begin(tmp_path):
    filled = threading.Event()

    class Waiting(FileWorkers):
        def suspend(self, reason):
            assert filled.wait(20)
            super().suspend(reason)

    def offered():
        yield from WEIGHTS
        filled.set()

    workers = Waiting(A)
    assert publish(offered(), 1, receiver=workers, shared=tmp_path).buckets == 1
    assert workers.events[0].startswith("suspend") and workers.events[1:3] == ["whereabouts", "begin"]


def test_a_receiver_that_cannot_be_suspended_gets_nothing(tmp_path):
    class Gone(FileWorkers):
        def suspend(self, reason):
            raise RuntimeError(f"no rollout server answered pause: {A} is down")

    workers = Gone(A)
    with pytest.raises(RuntimeError, match="no rollout server answered pause") as raised:
        publish(model().items(), 1, receiver=workers, transport=FileTransport(tmp_path, bucket_bytes=1000))
    assert workers.events == ["abandon"] and list(tmp_path.iterdir()) == []
    assert "and then: RuntimeError: no rollout server" in raised.value.__notes__[0]


def test_what_cannot_be_published_is_refused(tmp_path):
    events: list = []
    engine = FakeEngine(events)
    with pytest.raises(ValueError, match="is no folder"):
        publish(WEIGHTS, 1, receiver=engine, shared=tmp_path / "nowhere")
    assert events == [] and engine.refusal is None
    with pytest.raises(ValueError, match="offered no weights"):
        publish([], 1, receiver=engine, shared=tmp_path)
    with pytest.raises(ValueError, match="w is complex64; weights travel as one of float64, "):
        publish([("w", torch.ones(2, dtype=torch.complex64))], 1, receiver=engine, shared=tmp_path)
    assert list(tmp_path.iterdir()) == [] and "publishing policy version 1 failed" in engine.refusal


def test_a_full_folder_is_named_with_the_remedy(tmp_path):
    limits, workers = resource.getrlimit(resource.RLIMIT_FSIZE), FileWorkers(A)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(RuntimeError, match="cannot write weights into .* free some, lower weights.bucket_mib"):
            publish([("w", torch.ones(1000, 1000))], 9, receiver=workers, shared=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [] and workers.events[-1].startswith(
        "suspend: publishing policy version 9 failed"
    )
    publish(WEIGHTS, 9, receiver=workers, shared=tmp_path)
    assert workers.versions == {A: 9}


def refusing(where: str, when: str, nth: int = 1):
    """A spoil: one engine answers with a problem the nth time."""
    count = iter(range(1, 1000))
    return lambda e, method, _: ["out of memory"] if e == where and method == when and next(count) == nth else []


@pytest.mark.parametrize("when", ["rlalign_begin", "rlalign_take", "rlalign_finish"])
def test_one_of_two_servers_that_refuses_stops_both_and_the_next_publish_heals(tmp_path, when):
    workers = FileWorkers(A, B, spoil=refusing(B, when, nth=1 if when != "rlalign_take" else 3))
    transport = FileTransport(tmp_path, bucket_bytes=1000)
    with pytest.raises(
        RuntimeError, match=f"publishing policy version 1 failed: {B}, rank 0: out of memory.*full publish"
    ):
        publish(model().items(), 1, receiver=workers, transport=transport)
    assert "acknowledge" not in workers.events and workers.events[-3:-1] == ["abandon", "abandon"]
    assert workers.events[-1].startswith("suspend: publishing policy version 1 failed") and B in workers.events[-1]
    assert list(tmp_path.iterdir()) == []
    publish(model().items(), 1, receiver=workers, transport=transport)
    assert workers.versions == {A: 1, B: 1}


def test_equal_replicas_must_compute_with_equal_numbers(tmp_path):
    workers = FileWorkers(A, B)
    workers.fingerprints[B] = "other"
    with pytest.raises(
        RuntimeError, match=f"{A}, rank 0 and {B}, rank 0 took the same weights and compute with different"
    ):
        publish(WEIGHTS, 1, receiver=workers, shared=tmp_path)
    assert "acknowledge" not in workers.events


def test_a_worker_that_is_silent_is_an_error_and_a_server_that_left_is_not(tmp_path):
    class Silent(FileWorkers):
        def ask(self, method, *args):
            return [a for a in super().ask(method, *args) if method != "rlalign_take" or a["engine"] != B]

    with pytest.raises(RuntimeError, match=f"{B}, rank 0: did not answer"):
        publish(WEIGHTS, 1, receiver=Silent(A, B), shared=tmp_path)

    class Leaving(Silent):
        def ask(self, method, *args):
            self.engines = [A] if method == "rlalign_take" else self.engines
            return super().ask(method, *args)

    report = publish(WEIGHTS, 1, receiver=(workers := Leaving(A, B)), shared=tmp_path)
    assert report.ranks == 1 and workers.versions == {A: 1}


def test_servers_with_different_weights_need_all_of_them(tmp_path):
    workers = FileWorkers(A, B)
    publish(WEIGHTS, 4, receiver=workers, shared=tmp_path)
    workers.versions[B] = 0  # started again since
    publish(WEIGHTS, 5, receiver=workers, shared=tmp_path)
    assert workers.wholes == [False, False, True, True]


def damage(path, entries):
    """{what was done to the file: how} and the words it must be told with."""
    whole = path.read_bytes()
    yield "half written", whole[:-5], "half written"
    yield "flipped", whole[:-1] + bytes([whole[-1] ^ 1]), f"{entries[-1].name}: its bytes are not those that were sent"
    yield "no header", b"\0" * len(whole), "half written, or no bucket"
    yield "another file", whole.replace(b"layers.7.weight", b"layers.8.weight"), "names other tensors"


@pytest.mark.parametrize("mapped", [True, False])
def test_nothing_of_a_damaged_bucket_is_used(tmp_path, mapped):
    path = tmp_path / "b.safetensors"
    bucket = FileBucket(path, 10**6, str)
    for name, tensor in list(model().items())[:12]:
        bucket.add(name, tensor)
    bucket.seal(durable=False)
    for what, content, words in damage(path, bucket.entries):
        path.write_bytes(content)
        data, problems = read(path, bucket.entries, mapped=mapped, timeout_s=0.1)
        assert data is None and words in problems[0], what


def test_a_folder_is_read_again_until_the_bucket_is_whole(tmp_path):
    """As on a network filesystem: the file is not there yet, then short, then complete."""
    source, path = tmp_path / "source.safetensors", tmp_path / "b.safetensors"
    bucket = FileBucket(source, 10**6, str)
    bucket.add("w", weight := torch.randn(100, 100))
    bucket.seal(durable=True)
    whole = source.read_bytes()

    def appear() -> None:
        for size in (0, 20, 2**16 + 100, len(whole)):
            time.sleep(0.06)
            path.write_bytes(whole[:size])

    thread = threading.Thread(target=appear)
    thread.start()
    data, problems = read(path, bucket.entries, mapped=False, timeout_s=10)
    thread.join()
    assert problems == [] and torch.equal(bucket.entries[0].view(data), weight)


def test_ranks_go_on_together_after_a_failure(tmp_path):
    """The gathering of every parameter is collective: an iterator that is left half way would leave the other ranks waiting."""
    asked = []
    weights = (asked.append(i) or (f"w{i}", torch.ones(100)) for i in range(9))
    workers = FileWorkers(A, spoil=refusing(A, "rlalign_take"))
    with pytest.raises(RuntimeError, match="out of memory"):
        publish_from_ranks(weights, 1, receiver=lambda: workers, transport=FileTransport(tmp_path, bucket_bytes=1))
    assert asked == list(range(9))


def test_copies_of_dead_processes_are_removed_and_those_of_living_ones_are_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    host = socket.gethostname()
    left = tmp_path / f"rlalign-weights-{host}-{dead.pid}-x"
    living = tmp_path / f"rlalign-weights-{host}-{os.getppid()}-x"
    elsewhere = tmp_path / f"rlalign-weights-other-{host}-{dead.pid}-x"
    for folder in (left, living, elsewhere):
        folder.mkdir()
    publish(WEIGHTS, 1, receiver=FileWorkers(A), shared=tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([living, elsewhere])


def test_impossible_transports_are_refused_with_host_and_remedy():
    base = {"model": {"path": "x"}, "task": {"name": "y"}}
    for weights, words in (
        ({"transport": "carrier_pigeon"}, "choose one of shared_memory, folder, gloo, nccl"),
        ({"transport": "folder"}, "the memory of one box; name a folder"),
        ({"transport": "gloo"}, "use weights.transport=shared_memory, or rollout.backend=server"),
        ({"bucket_mib": 0}, "weights.bucket_mib=0: must be positive"),
        ({"port": 70000}, "a TCP port is 1 to 65535"),
    ):
        with pytest.raises(ValueError, match=words):
            load(base | {"weights": weights})
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=f"{socket.gethostname()}.*has no CUDA device.*use weights.transport=gloo"):
            open_transport(WeightsConfig(transport="nccl"))
