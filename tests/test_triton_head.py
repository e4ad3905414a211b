"""The Triton kernels in Triton's interpreter, against float64: shapes that break kernels, values that break sums, and the law that
a row's bits depend on the row and the weight alone. What needs a GPU is in benchmarks/gpu.py.

N tokens, D hidden, V vocabulary.
"""

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from rlalign.head import routes
from rlalign.head import triton as gpu_head
from rlalign.head.products import Route
from rlalign.head.projection import project, route
from rlalign.logprobs import token_logprobs
from rlalign.logprobs.blocks import Tile, columns_of
from rlalign.logprobs.forward import Problem, Transform, forward_sums
from rlalign.rollout.head.decode import decode_logits
from rlalign.rollout.head.head_settings import HeadMode, HeadSettings

WIDTH = gpu_head.PLANS[64].columns
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows that are meant to overflow


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read when the kernels are defined, and by the interpreter
        patch.setenv(gpu_head.VARIABLE, gpu_head.TRITON)
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        yield


def dot(builder, a, b, d, *precision):
    """The interpreter's product in float64, rounded once: numpy's in float32 has other bits at another column on AVX2 hosts.

    Sums of products of bfloat16 numbers of one size are exact in float64, so that no order of numpy's shows.
    """
    product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
    return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)


def operands(n: int, v: int, d: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(n + v + d)
    return torch.randn(n, d).to(dtype), (torch.randn(v, d) / d**0.5).to(dtype)


def exact_logits(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return h.double() @ w.double().t()


SHAPES = [(1, 1, 1), (1, WIDTH, 64), (19, WIDTH + 45, 70), (65, 3, 130), (129, 2 * WIDTH + 1, 5)]


@pytest.mark.parametrize("n, v, d", SHAPES)
def test_logits_are_those_of_float64_and_a_row_alone_has_the_same_bits(n, v, d):
    h, w = operands(n, v, d)
    bias = torch.linspace(-2, 2, v)
    assert route(h, w) is Route.TRITON
    got = project(h, w, bias)
    size = h.double().abs() @ w.double().abs().t() + bias.abs()
    assert bool(((got - exact_logits(h, w) - bias).abs() <= 2.0**-20 * size).all())
    for start, stop in {(0, 1), (n - 1, n), (n // 3, n)}:
        assert torch.equal(project(h[start:stop], w, bias), got[start:stop])
    first = v // 3
    assert torch.equal(project(h, w[first:], bias[first:]), got[:, first:])


def test_strides_dtypes_and_emptiness():
    h, w = operands(7, 40, 33, torch.float16)
    wide_h, wide_w = torch.zeros(7, 66, dtype=h.dtype), torch.zeros(33, 80, dtype=w.dtype)
    wide_h[:, ::2], wide_w.t()[::2] = h, w
    got = project(h, w)
    torch.testing.assert_close(got.double(), exact_logits(h, w), atol=2e-5, rtol=0)
    assert torch.equal(project(wide_h[:, ::2], wide_w.t()[::2]), got)
    assert project(h[:0], w).shape == (0, 40)


def sums_of(h, w, target, *, first=0, temperature=None, cap=None, scale=1.0, bias=None):
    problem = Problem(h, w, bias, target - first, Transform(cap, scale, temperature), Tile(64, 2 * WIDTH), route(h, w))
    assert problem.one_pass
    return forward_sums(problem, mean=True)


def test_a_rows_sums_depend_on_the_row_and_its_weight_alone():
    h, w = operands(130, 2 * WIDTH + 9, 64)
    target = torch.arange(130) * 5 % len(w)
    whole = sums_of(h, w, target)
    for rows in (slice(0, 1), slice(64, 130), slice(129, 130)):
        for part, value in zip(sums_of(h[rows], w, target[rows]), whole, strict=True):
            assert torch.equal(part, value[rows])


def test_shards_of_the_vocabulary_add_up_to_the_whole():
    h, w = operands(5, WIDTH + 70, 64)
    target = torch.tensor([0, 40, 41, WIDTH, WIDTH + 69])
    whole = sums_of(h, w, target)
    shards = [sums_of(h, w[a:b], target, first=a) for a, b in ((0, 41), (41, WIDTH + 70), (0, 0))]
    lse_RN = torch.stack([shard.lse_N for shard in shards])
    assert bool((lse_RN[2] == -torch.inf).all())
    torch.testing.assert_close(lse_RN.logsumexp(0), whole.lse_N, atol=2e-6, rtol=0)
    found = torch.stack([shard.target_N for shard in shards])
    assert torch.equal(found.isnan().sum(0), torch.full((5,), 2))
    assert torch.equal(found.nan_to_num(0).sum(0), whole.target_N)


def test_values_that_break_a_softmax():
    h, w = operands(6, WIDTH + 3, 32, torch.float32)
    h[0] *= 1e4  # logits in the thousands
    h[1] = 0.0
    h[2, 3] = torch.nan
    h[3, 4] = torch.inf
    h[4] = -3e38  # finite operands, infinite products
    h, w = h.bfloat16(), w.bfloat16()
    target = torch.tensor([3, WIDTH, 5, 6, 7, WIDTH + 40])  # the last is outside
    sums = sums_of(h, w, target)
    exact = exact_logits(h, w).log_softmax(-1)
    got = sums.target_N - sums.lse_N
    assert got[0].item() == pytest.approx(exact[0, 3].item(), rel=1e-5)
    assert got[1].item() == pytest.approx(-torch.tensor(float(len(w))).log().item(), abs=1e-6)
    assert bool(got[2:].isnan().all())
    assert bool(sums.lse_N[[0, 1, 5]].isfinite().all())  # a bad row spoils no other
    entropy = (sums.lse_N - sums.mean_N)[[0, 1, 5]]
    exact_entropy = -(exact.exp() * exact.clamp_min(-1e9)).sum(-1)[[0, 1, 5]]
    torch.testing.assert_close(entropy.double(), exact_entropy, atol=2e-3, rtol=1e-5)


OPTIONS = {
    "plain": {},
    "heat per token": {"temperature": True},
    "cap": {"soft_cap": 3.0},
    "all": {"soft_cap": 3.0, "logit_scale": 0.5, "temperature": True, "bias": True, "vocab_size": WIDTH + 20},
}


def leaves(bias: bool, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    h, w = operands(2 * 9, WIDTH + 30, 40, dtype)
    made = [h.view(2, 9, 40), w, torch.randn(len(w)) if bias else None]
    return [None if x is None else x.clone().requires_grad_() for x in made]


def scored(options: dict, keep_mib: int = 0, kept: bool = False, dtype: torch.dtype = torch.bfloat16):
    """(results and gradients of token_logprobs, the same from float64)."""
    options, real = dict(options), options.get("vocab_size", WIDTH + 30)
    mine = leaves(options.pop("bias", False), dtype)
    h, w, b = [None if x is None else x.detach().double().requires_grad_() for x in mine]
    ids = (torch.arange(18) * 31 % real).view(2, 9)
    heat = torch.linspace(0.6, 1.5, 18).view(2, 9) if options.pop("temperature", False) else None
    sets = torch.stack([ids, (ids + 7) % real, torch.full_like(ids, -1)], -1) if kept else None
    got = token_logprobs(
        mine[0], mine[1], ids, bias=mine[2], temperature=1.0 if heat is None else heat, entropy=True, keep_mib=keep_mib,
        kept=sets, **options,
    )  # fmt: skip
    x = h[:, :-1] @ w[:real].t()
    x = x if b is None else x + b[:real]
    if cap := options.get("soft_cap"):
        x = torch.tanh(x / cap) * cap
    x = x * options.get("logit_scale", 1.0)
    x = x if heat is None else x / heat[:, 1:, None].double()
    if kept:
        allowed = torch.zeros(*x.shape, dtype=torch.bool).scatter_(2, sets[:, 1:, :2], True)
        x = x.masked_fill(~allowed, -1e30)
    p = x.log_softmax(-1)
    exact = [p.gather(-1, ids[:, 1:, None])[..., 0], -(p.exp() * p).sum(-1)]
    slope = torch.linspace(-1, 1, 16).view(2, 8)
    outcome = []
    for (logprob, entropy), of in (((y[:, 1:] for y in got), mine), (exact, (h, w, b))):
        loss = (logprob * slope).sum() + (entropy * slope.flip(0)).sum()
        grads = torch.autograd.grad(loss, [y for y in of if y is not None])
        outcome.append([logprob.detach(), entropy.detach(), *grads])
    return outcome


@pytest.mark.parametrize("way", [gpu_head.TRITON, gpu_head.ONE_PASS])
@pytest.mark.parametrize("name", OPTIONS)
def test_logprobs_entropies_and_gradients_are_those_of_float64(name, way, monkeypatch):
    monkeypatch.setenv(gpu_head.VARIABLE, way)
    got, exact = scored(OPTIONS[name])
    for value, wanted in zip(got[:2], exact[:2], strict=True):
        torch.testing.assert_close(value.double(), wanted, atol=5e-6, rtol=0)
    # rounded to their operand's dtype; where the product has one for bf16, as CUDA does, the gradient of the logits was too
    part = 2.0**-8 if way == gpu_head.TRITON else 1e-2
    for value, wanted in zip(got[2:], exact[2:], strict=True):
        assert float((value.double() - wanted).abs().max()) <= part * float(wanted.abs().max())


def test_what_is_kept_between_the_passes_changes_no_bit():
    kept, fresh = scored(OPTIONS["all"], keep_mib=1)[0], scored(OPTIONS["all"])[0]
    for value, wanted in zip(kept, fresh, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("way", [gpu_head.TRITON, gpu_head.ONE_PASS])
@pytest.mark.parametrize(("name", "dtype"), [("plain", torch.float16), ("all", torch.bfloat16)])
def test_over_kept_sets_too(name, dtype, way, monkeypatch):
    monkeypatch.setenv(gpu_head.VARIABLE, way)
    got, exact = scored(OPTIONS[name], kept=True, dtype=dtype)
    for value, wanted in zip(got[:2], exact[:2], strict=True):
        torch.testing.assert_close(value.double(), wanted, atol=5e-6, rtol=0)
    rounding = {torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for value, wanted in zip(got[2:], exact[2:], strict=True):
        assert float((value.double() - wanted).abs().max()) <= rounding * float(wanted.abs().max())


def test_over_kept_sets_what_is_kept_and_what_is_mirrored_have_the_same_gradients():
    kept, fresh = scored(OPTIONS["all"], keep_mib=1, kept=True)[0], scored(OPTIONS["all"], kept=True)[0]
    for value, wanted in zip(kept, fresh, strict=True):
        assert torch.equal(value, wanted)
    mirrored, exact = scored(OPTIONS["all"] | {"mode": "exact_mirror"}, keep_mib=1, kept=True)
    for value, wanted in zip(mirrored[:2], exact[:2], strict=True):
        torch.testing.assert_close(value.double(), wanted, atol=5e-6, rtol=0)
    for value, wanted in zip(mirrored[2:], fresh[2:], strict=True):
        torch.testing.assert_close(value, wanted, atol=2.0**-7 * float(wanted.abs().max()), rtol=0)


def test_the_mirror_carries_the_bits_of_the_engines_logits():
    h, w = operands(18, WIDTH + 30, 40)
    ids = (torch.arange(18) * 31 % len(w)).view(2, 9)
    got = token_logprobs(h.view(2, 9, 40), w, ids, mode="exact_mirror")
    for b in range(2):
        for t in range(1, 9):  # one token at a time, as an engine decodes
            engine = project(h.view(2, 9, 40)[b, t - 1 : t], w).log_softmax(-1)
            assert torch.equal(engine[0, ids[b, t]], got[b, t])


def test_names_that_do_not_exist_and_kernels_that_cannot_run(monkeypatch):
    h, w = operands(1, 4, 4)
    monkeypatch.setenv(gpu_head.VARIABLE, "cutlass")
    with pytest.raises(ValueError, match="must be cublas, cublas_one_pass or triton; got 'cutlass'"):
        route(h, w)
    monkeypatch.setenv(gpu_head.VARIABLE, gpu_head.TRITON)
    monkeypatch.setattr(gpu_head, "_installed", lambda: False)
    with pytest.raises(RuntimeError, match="without Triton"):
        route(h, w)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert route(h, w) is not Route.TRITON  # a CPU has other routes, whatever GPUs are to do


def test_both_sides_of_a_run_prove_the_same_bits_and_take_the_same_kernel(monkeypatch):
    h, w = operands(1, 97, 64)
    found = routes.bits(project, 64, h.dtype, w.dtype, h.device)
    assert found == routes.bits(decode_logits, 64, h.dtype, w.dtype, h.device)
    assert found != routes.bits(lambda a, b: project(a, b) * (1 + 2**-23), 64, h.dtype, w.dtype, h.device)
    assert routes.bits(project, 64, h.dtype, w.dtype, torch.device("meta")) is None
    engine = HeadSettings()
    assert engine.resolve(device="cuda") is HeadMode.CACHED
    monkeypatch.delenv(gpu_head.VARIABLE)
    assert engine.resolve(device="cuda") is HeadMode.NATIVE


@pytest.mark.parametrize("vocab", [0, 1, 257, 8192, 8193, 16383, 16385, 32003, 131072, 151936, 262144])
def test_a_gpus_blocks_of_the_vocabulary_are_whole_tiles_but_the_last(vocab):
    width = Tile.of(torch.device("meta"), None).vocab
    blocks = columns_of(vocab, width)
    assert [i for block in blocks for i in (block.start, block.stop)][1:-1:2] == [block.start for block in blocks[1:]]
    assert sum(block.stop - block.start for block in blocks) == vocab
    assert all(block.start % WIDTH == 0 and 0 < block.stop - block.start <= width for block in blocks)
    assert vocab == 1 or all(block.stop - block.start > 1 for block in blocks)
