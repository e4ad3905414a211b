"""weights.transport=gloo into two real servers through vLLM's own interface. Lost workers: tests/test_weights_gloo.py."""

from contextlib import closing

import pytest
import torch

from rlalign.config import WeightsConfig
from rlalign.weights import open_transport, publish
from tests.engine.conftest import logprobs_of, perturbed, sample

SMALL = 2**17  # bytes: a float32 model of this size takes a dozen buckets


def gloo(*, timeout_s: float = 20.0, **settings):
    transport = open_transport(WeightsConfig(transport="gloo", timeout_s=timeout_s, **settings))
    transport.bucket_bytes = SMALL
    return transport


@pytest.fixture(scope="module")
def pool(two_servers):
    pool = two_servers.pool()
    yield pool
    pool.close()


def test_both_servers_compute_with_what_was_sent(pool, untied, tmp_path):
    """One group from publish to publish; the same head, bit for bit, and logprobs as after a publish through files."""
    transport = gloo()
    first, second = (perturbed(untied, seed=seed, dtype=torch.float32) for seed in (1, 2))
    with closing(transport):
        report = publish(first.named_parameters(), 1, receiver=pool, transport=transport)
        group = transport._group
        assert (report.ranks, report.tensors) == (2, 25) and report.buckets > 10
        assert report.bytes == sum(p.nbytes for p in first.parameters())
        over_the_wire = logprobs_of(sample(pool))
        fingerprints = {status["fingerprint"] for status in pool.status()}
        publish(second.named_parameters(), 2, receiver=pool, transport=transport)
        assert transport._group is group
        assert not torch.distributed.is_initialized(), "the trainer's default group is its own affair"
    publish(first.named_parameters(), 1, receiver=pool, shared=tmp_path)
    assert {status["fingerprint"] for status in pool.status()} == fingerprints and len(fingerprints) == 1
    for through_files, other in zip(logprobs_of(sample(pool)), over_the_wire, strict=True):
        assert through_files == pytest.approx(other, abs=1e-5)  # which requests meet in a batch is a matter of timing


def test_a_bucket_with_a_flipped_bit_is_refused_and_the_next_publish_heals(pool, untied):
    """Damaged after its digest was taken: both workers say so, neither server samples, and a new group is formed."""
    transport, model = gloo(), perturbed(untied, seed=3, dtype=torch.float32)
    deliver = transport.deliver

    def damaged(receiver, bucket):
        if any("layers.1.mlp.down_proj" in e.name for e in bucket.entries):
            bucket.buffer[bucket.entries[-1].start] ^= 1
        return deliver(receiver, bucket)

    with closing(transport):
        transport.deliver = damaged
        with pytest.raises(RuntimeError, match="its bytes are not those that were sent") as raised:
            publish(model.named_parameters(), 3, receiver=pool, transport=transport)
        assert all(url in str(raised.value) for url in pool.engines)
        with pytest.raises(RuntimeError, match="publishing policy version 3 failed"):
            sample(pool)
        transport.deliver = deliver
        with pytest.raises(RuntimeError, match="not published, and this worker's own is not to be trusted"):
            publish([("lm_head.weight", model.lm_head.weight)], 3, receiver=pool, transport=transport)
        publish(model.named_parameters(), 3, receiver=pool, transport=transport)
        assert {r.policy_version for r in sample(pool)} == {3}
