"""The cache of the fp32 head against every way a weight can change under it."""

import pytest
import torch

from rlalign.head_cache import Epoch, HeadCache, fingerprint, same_bits


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.nn.Parameter(torch.randn(96, 64).bfloat16(), requires_grad=False)


def fresh(cache, weight):
    return torch.equal(cache.get(weight), weight.detach().float())


WRITES = {
    "copy_": lambda w: w.copy_(torch.randn_like(w)),
    "slice": lambda w: w[:16].add_(1.0),
    "data.copy_": lambda w: w.data.copy_(torch.randn_like(w)),
    "data =": lambda w: setattr(w, "data", torch.randn_like(w)),
    "memcpy": lambda w: w.data.view(torch.int16).numpy().__setitem__(slice(None), 7),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_every_write_is_seen(weight, write):
    cache = HeadCache()
    assert fresh(cache, weight)
    with torch.no_grad():
        write(weight)
    assert fresh(cache, weight)


def test_an_unchanged_weight_is_built_once(weight):
    cache = HeadCache()
    for _ in range(5):
        cache.get(weight)
    assert (cache.rebuilds, cache.calls) == (1, 5)
    assert cache.nbytes == weight.numel() * 4


def test_the_epoch_alone_forces_a_rebuild(weight):
    """Without the fingerprint, a write through .data is invisible to the metadata; the epoch is what catches it."""
    cache = HeadCache(check_every=10**9)
    cache.get(weight)
    weight.data.copy_(torch.randn_like(weight))
    assert not fresh(cache, weight), "the metadata key saw a .data write: the epoch hooks may no longer be needed"
    Epoch.bump()
    assert fresh(cache, weight)


def test_two_heads_do_not_share_a_copy(weight):
    other = torch.nn.Parameter(weight.detach() * 2, requires_grad=False)
    cache = HeadCache()
    assert fresh(cache, weight) and fresh(cache, other) and fresh(cache, weight)
    assert cache.rebuilds == 2


def test_inference_tensors_have_no_version_and_still_work():
    with torch.inference_mode():
        weight = torch.randn(32, 64).bfloat16()
    cache = HeadCache()
    assert fresh(cache, weight)
    with torch.inference_mode():
        weight.copy_(torch.randn(32, 64))
    assert fresh(cache, weight)


def test_float32_weights_are_used_in_place():
    weight = torch.randn(32, 64)
    cache = HeadCache()
    assert cache.get(weight).data_ptr() == weight.data_ptr()
    assert cache.nbytes == 0


def test_meta_weights_are_refused():
    with pytest.raises(RuntimeError, match="meta device"):
        HeadCache().get(torch.empty(4, 4, device="meta"))


def test_fingerprint_visits_every_column_and_row_block():
    weight = torch.zeros(4096, 256)
    index = torch.arange(weight.numel()).view_as(weight)
    seen = fingerprint(index)
    assert len(set((seen % 256).tolist())) == 256
    assert (seen[1:] - seen[:-1]).max() <= 4 * weight.numel() // 1024 + 1


def test_same_bits_distinguishes_zero_signs_and_accepts_nan():
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
