"""The compiled head: one fused chain per logit whatever the path, the batch and the threads; AMX has the bits of the library."""

import ctypes
import ctypes.util
from contextlib import contextmanager

import pytest
import torch

from rlalign.head import kernel as head_kernel
from rlalign.head import projection, routes
from rlalign.head.kernel import PATHS
from rlalign.head.products import Route, logits_of
from rlalign.rollout.head.decode import decode_logits
from tests.kernel_parts import needs_compiler

pytestmark = needs_compiler
BLOCK = 256  # of the law in fma.c
FMA = [path for path in ("avx2", "avx512") if path in head_kernel.host_paths()]


@pytest.fixture
def kernel(compiled, monkeypatch):
    """The kernel of a path by its name."""
    monkeypatch.setenv("RLALIGN_CACHE", str(compiled))

    def of(path):
        monkeypatch.setenv(head_kernel.VARIABLE, path)
        return head_kernel.amx() if path == "amx" else head_kernel.fma()

    return of


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def operands(rows, vocabulary, hidden, *, seed=0, dtypes=(torch.bfloat16, torch.bfloat16)):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(n, hidden, generator=generator).to(t) for n, t in zip((rows, vocabulary), dtypes, strict=True)
    )


def made(kernel, hidden, weight):
    return kernel(hidden, weight, torch.full((len(hidden), len(weight)), torch.nan))


def same(one, other):
    """Bit for bit, signs of zeros included; any NaN equals any other."""
    nan = one.isnan() & other.isnan()
    return torch.equal(one.masked_fill(nan, 0).view(torch.int32), other.masked_fill(nan, 0).view(torch.int32))


def by_the_law(hidden, weight):
    """libm's fmaf, one element after the other."""
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    logits = torch.empty(len(hidden), len(weight))
    for n, h in enumerate(hidden.float().tolist()):
        for v, w in enumerate(weight.float().tolist()):
            for start in range(0, len(h), BLOCK):
                total = 0.0
                for x, y in zip(h[start : start + BLOCK], w[start : start + BLOCK], strict=True):
                    total = fmaf(x, y, total)
                logits[n, v] = total if start == 0 else logits[n, v] + torch.tensor(total)
    return logits


@pytest.mark.parametrize("path", FMA)
@pytest.mark.parametrize("size", [1, 2, 15, 16, 33, 255, 256, 257, 700])
def test_each_logit_is_one_chain_of_fused_multiply_adds_per_block(kernel, path, size):
    for rows in (2, 7):
        for dtypes in (
            (torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float32),
        ):
            hidden, weight = operands(rows, 11, size, dtypes=dtypes)
            assert same(made(kernel(path), hidden, weight), by_the_law(hidden, weight)), (rows, dtypes)


@pytest.mark.parametrize("path", FMA)
def test_no_value_leaves_the_law_and_none_reaches_a_neighbour(kernel, path):
    tiny = 2.0**-126
    for size in (40, 300):
        hidden, weight = operands(9, 21, size)
        hidden[1, 3], hidden[2, 0], weight[7, 5], weight[9] = torch.inf, torch.nan, -torch.inf, 1e30
        hidden[3], hidden[4], weight[20], hidden[5] = 2 * tiny, -0.0, torch.nan, -1e-30
        weight[4], weight[5] = 1e-30, tiny / 4
        expected = by_the_law(hidden, weight)
        for n in (5, 6, 9):
            got = made(kernel(path), hidden[:n], weight)
            assert same(got, expected[:n])
        assert got[0, :7].isfinite().all() and got[0, 8:20].isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_neither_rows_nor_columns_nor_threads_nor_lanes_change_a_bit(kernel, count):
    for size in (96, 1000):
        for dtype in (torch.bfloat16, torch.float32):
            hidden, weight = operands(256, 1003, size, dtypes=(dtype, dtype))
            with threads(1):
                whole = made(kernel(FMA[0]), hidden, weight)
            with threads(count):
                for path in FMA:
                    for n in (*range(1, 34), 63, 64, 100, 241, 255, 256):
                        first = (n * 7) % (257 - n)
                        assert torch.equal(
                            made(kernel(path), hidden[first : first + n], weight), whole[first : first + n]
                        )
                    for start, stop in ((0, 1), (5, 12), (501, 1003), (1002, 1003)):
                        for n in (1, 30):
                            assert torch.equal(
                                made(kernel(path), hidden[:n], weight[start:stop]), whole[:n, start:stop]
                            )


@pytest.mark.parametrize("path", FMA)
def test_the_error_is_that_of_float32_sums(kernel, path):
    hidden, weight = operands(40, 500, 4096)
    exact = hidden.double() @ weight.double().t()
    size = hidden.double().abs() @ weight.double().abs().t()
    assert ((made(kernel(path), hidden, weight) - exact).abs() <= 2.0**-20 * size).all()


@pytest.mark.parametrize("path", [*FMA, *(["amx"] if "amx" in head_kernel.host_paths() else [])])
def test_strided_operands_and_a_strided_result(kernel, path):
    hidden, weight = operands(21, 200, 256)
    out = torch.full((21, 300), 7.0)
    kernel(path)(hidden[:, :128], weight[:, 128:], out[:, 50:250])
    expected = made(kernel(path), hidden[:, :128].contiguous(), weight[:, 128:].contiguous())
    assert torch.equal(out[:, 50:250], expected)
    assert bool((out[:, :50] == 7.0).all()) and bool((out[:, 250:] == 7.0).all())
    turned = torch.empty(200, 21).t()
    assert torch.equal(kernel(path)(hidden.t().contiguous().t()[:, :128], weight[:, 128:], turned), expected)


def test_no_rows_make_no_logits(kernel):
    for path in FMA:
        assert made(kernel(path), *operands(0, 50, 64)).shape == (0, 50)


needs_amx = pytest.mark.skipif("amx" not in head_kernel.host_paths(), reason="needs a CPU with AMX")


@needs_amx
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 32, 33, 49, 130])
def test_amx_has_every_bit_of_the_library_product(kernel, rows, count):
    with threads(count):
        for vocabulary in (1, 15, 16, 63, 64, 65, 129, 1000):
            for size in (32, 96, 1024):
                hidden, weight = operands(rows, vocabulary, size)
                expected = logits_of(hidden, weight, Route.MKL_BF16)
                assert torch.equal(made(kernel("amx"), hidden, weight), expected), (vocabulary, size)


@needs_amx
def test_extreme_values_come_out_of_amx_as_of_the_library(kernel):
    hidden, weight = operands(5, 80, 64)
    hidden[1, 3], hidden[2, 0], weight[7, 5], weight[9] = torch.inf, torch.nan, -torch.inf, 1e30
    hidden[3] = 1e-30
    assert same(made(kernel("amx"), hidden, weight), logits_of(hidden, weight, Route.MKL_BF16))


@needs_amx
def test_one_wrong_bit_of_amx_and_it_is_not_used(kernel, monkeypatch, caplog):
    honest = head_kernel.Kernel.__call__

    def off_by_one_bit(self, hidden, weight, out):
        honest(self, hidden, weight, out)
        out.view(torch.int32)[-1, -1] ^= 1
        return out

    amx = kernel("amx")
    monkeypatch.setattr(head_kernel.Kernel, "__call__", off_by_one_bit)
    routes._has_library_bits.cache_clear()
    try:
        assert routes.decode_kernel(Route.MKL_BF16, *operands(1, 1, 64)) is None
        assert amx is not None and "its bits differ" in caplog.text
    finally:
        routes._has_library_bits.cache_clear()


@needs_amx
def test_amx_leaves_sizes_that_fill_no_tile_to_the_library(kernel):
    assert not kernel("amx").takes(*operands(1, 1, 48))


@pytest.mark.parametrize("asked", ["auto", "none", *(path for path in PATHS if path in head_kernel.host_paths())])
@pytest.mark.parametrize("dtype", projection.FLOATS)
def test_whatever_the_environment_asks_for_decoding_and_training_agree(kernel, monkeypatch, asked, dtype):
    kernel(asked)
    hidden, weight = operands(300, 700, 128, dtypes=(dtype, dtype))
    training = projection.project(hidden, weight)
    for n in (1, 2, 8, 17, 256):
        assert torch.equal(decode_logits(hidden[:n], weight), training[:n])
    chosen = projection.route(hidden, weight)
    assert chosen is not Route.STRICT_FP32
    if asked in FMA:
        assert chosen is Route.KERNEL_FMA
    if asked == "none":
        assert chosen is not Route.KERNEL_FMA
