"""The decode head: the bits of head.project, in memory that is never shared by two living results."""

import pytest
import torch

from rlalign.head import projection
from rlalign.head.cache import Epoch
from rlalign.rollout.head.decode import KEPT_AT_MOST, LogitsMemory, decode_logits


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("vocabulary", [1, 5, 320, 2049])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_the_bits_are_those_of_project(rows, vocabulary, dtype, bias):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 96, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, 96, generator=generator).to(dtype)
    offsets = torch.randn(vocabulary, generator=generator).to(dtype) if bias else None
    assert torch.equal(decode_logits(hidden, weight, offsets), projection.project(hidden, weight, offsets))


def test_results_that_are_still_alive_keep_their_memory():
    hidden, weight = torch.randn(4, 64).bfloat16(), torch.randn(300, 64).bfloat16()
    first = decode_logits(hidden, weight)
    kept = first.clone()
    decode_logits(-hidden, weight)
    assert torch.equal(first, kept)


def test_memory_is_lent_again_only_when_nothing_is_left_of_the_last_result():
    memory = LogitsMemory()
    first = memory.take(3, 5)
    address = first.data_ptr()
    sliced = first[1:, :2]
    del first
    assert memory.take(3, 5).data_ptr() != address, "a slice was alive"
    del sliced
    assert memory.take(2, 5).data_ptr() == address
    with torch.inference_mode():
        view = memory.take(2, 5).view(-1).detach()
    assert memory.take(2, 5).data_ptr() != view.data_ptr()


def test_large_results_and_sleep_leave_nothing_behind():
    memory = LogitsMemory()
    memory.take(1, KEPT_AT_MOST // 4 + 1)
    assert memory.nbytes == 0
    memory.take(2, 100)
    assert memory.nbytes == 800 + 64  # and one cache line to begin at
    Epoch.bump("test")
    assert memory.nbytes == 0
