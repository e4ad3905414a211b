"""The compiled decode head: the library product's bits for every shape, and nothing at all where it cannot be trusted."""

import shutil

import pytest
import torch

from rlalign import head_kernel
from rlalign.products import Route, logits_of
from rlalign.rollout.decode_head import decode_logits

needs_amx = pytest.mark.skipif(
    not head_kernel._has_amx() or shutil.which("gcc") is None, reason="needs a CPU with AMX and gcc"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLALIGN_CACHE", str(tmp_path))
    head_kernel.loaded.cache_clear()
    yield tmp_path
    head_kernel.loaded.cache_clear()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLALIGN_CACHE", str(folder))
        head_kernel.build()
    return folder


@pytest.fixture
def built(cache, compiled, monkeypatch):
    monkeypatch.setenv("RLALIGN_CACHE", str(compiled))
    return head_kernel.loaded


def operands(rows, vocabulary, hidden, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn(n, hidden, generator=generator).bfloat16() for n in (rows, vocabulary))
    return tuple(draw)


@needs_amx
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 32, 33, 49, 130])
def test_every_bit_is_the_library_products(built, rows, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for vocabulary in (1, 15, 16, 63, 64, 65, 129, 1000):
            for size in (32, 96, 1024):
                hidden, weight = operands(rows, vocabulary, size)
                out = torch.full((rows, vocabulary), torch.nan)
                expected = logits_of(hidden, weight, Route.MKL_BF16)
                assert torch.equal(built(size)(hidden, weight, out), expected), (vocabulary, size)
    finally:
        torch.set_num_threads(before)


@needs_amx
def test_strided_operands_and_a_strided_result(built):
    hidden, weight = operands(21, 200, 256)
    out = torch.full((21, 300), 7.0)
    built(128)(hidden[:, :128], weight[:, 128:], out[:, 50:250])
    expected = logits_of(hidden[:, :128].contiguous(), weight[:, 128:].contiguous(), Route.MKL_BF16)
    assert torch.equal(out[:, 50:250], expected)
    assert bool((out[:, :50] == 7.0).all()) and bool((out[:, 250:] == 7.0).all())


@needs_amx
def test_extreme_values_come_out_as_in_the_library(built):
    hidden, weight = operands(5, 80, 64)
    hidden[1, 3], hidden[2, 0], weight[7, 5], weight[9] = torch.inf, torch.nan, -torch.inf, 1e30
    hidden[3] = 1e-30
    out = built(64)(hidden, weight, torch.empty(5, 80))
    assert torch.equal(out.nan_to_num(nan=1.5e3), logits_of(hidden, weight, Route.MKL_BF16).nan_to_num(nan=1.5e3))


@needs_amx
def test_the_decode_head_takes_it_and_gives_the_same_bits(cache):
    hidden, weight = operands(9, 500, 128)
    assert head_kernel.loaded(128) is None, "nothing is compiled behind the user's back"
    library = decode_logits(hidden, weight).clone()
    head_kernel.build()
    head_kernel.loaded.cache_clear()
    assert head_kernel.loaded(128) is not None
    assert torch.equal(decode_logits(hidden, weight), library)


@needs_amx
def test_one_wrong_bit_and_it_is_not_used(built, monkeypatch, caplog):
    honest = head_kernel._Kernel.__call__

    def off_by_one_bit(self, hidden, weight, out):
        honest(self, hidden, weight, out)
        out.view(torch.int32)[-1, -1] ^= 1
        return out

    monkeypatch.setattr(head_kernel._Kernel, "__call__", off_by_one_bit)
    assert built(64) is None
    assert "its bits differ" in caplog.text


@needs_amx
def test_sizes_that_fill_no_tile_are_left_to_the_library(built):
    assert built(48) is None


def test_without_a_compiler_it_says_what_to_install(cache, monkeypatch):
    monkeypatch.setattr(head_kernel, "_has_amx", lambda: True)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RuntimeError, match="no C compiler .*install"):
        head_kernel.build()


def test_another_processor_is_told_that_nothing_is_lost(cache, monkeypatch):
    monkeypatch.setattr(head_kernel, "_has_amx", lambda: False)
    with pytest.raises(RuntimeError, match="no AMX.*same bits"):
        head_kernel.build()
    assert head_kernel.loaded(64) is None


@needs_amx
def test_a_compiler_that_fails_leaves_nothing(cache, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'no such flag' >&2; exit 3\n")
    broken.chmod(0o755)
    with pytest.raises(RuntimeError, match="could not compile head_amx.c: no such flag"):
        head_kernel.build(str(broken))
    assert not head_kernel.library_path().exists()
    assert list(head_kernel.library_path().parent.iterdir()) == []
