"""Over ranks: two gloo processes against one, sums exactly, quantiles within the sketch's stated rank error."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlalign import mismatch
from rlalign.mismatch.stats import Distribution
from rlalign.objective import corrections

QUANTILE = ("p50", "p90", "p99", "p999")
WITH_COMPANIONS = ("k1", "k2", "k3", "prob_abs", "ratio", "mult_error")
SKETCHED = (*QUANTILE, "abs_trimmed", *(f"{n}_{s}" for n in WITH_COMPANIONS for s in ("median", "trimmed")))


def data():
    g = torch.Generator().manual_seed(0)
    rollout = -3.0 * torch.rand(24, 2000, generator=g)
    old = rollout + 0.05 * torch.randn(24, 2000, generator=g).abs().pow(2)
    mask = torch.rand(24, 2000, generator=g) < 0.9
    return old, rollout, mask, torch.arange(24) % 3, torch.arange(24) // 4


def worker(rank, address, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    old, rollout, mask, lag, group = data()
    rows = slice(0, 5) if rank == 0 else slice(5, 24)  # unequal shards; group 1 is split between the ranks
    stats = mismatch.collect(old[rows], rollout[rows], mask[rows], lag_B=lag[rows], group_B=group[rows])
    metrics = mismatch.summarize(mismatch.reduce(stats))
    c = corrections.correct(old[rows], rollout[rows], mask[rows], level="token", mode="truncate", high=1.05)
    c = corrections.normalized(c, over_ranks=True)
    nothing = mismatch.collect(old[rows], rollout[rows], mask[rows] & (rank == 1), positions=False)
    lonely = mismatch.summarize(mismatch.reduce(nothing))
    queue.put((rank, metrics, float(c.weights.double().sum()), int(c.keep.sum()), lonely))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    context = mp.get_context("forkserver")
    queue = context.Queue()
    address = tmp_path_factory.mktemp("gloo") / "store"
    ranks = [context.Process(target=worker, args=(rank, address, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    answers = sorted(queue.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    return answers


@pytest.mark.slow
def test_sums_counts_and_extremes_equal_a_single_process(reduced):
    old, rollout, mask, lag, group = data()
    whole = mismatch.compare(old, rollout, mask, lag_B=lag, group_B=group)
    metrics = reduced[0][1]
    assert metrics.keys() == whole.keys()
    for name, value in whole.items():
        if name.split("/")[-1] not in SKETCHED:
            assert metrics[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


@pytest.mark.slow
def test_every_rank_has_the_same_answer(reduced):
    assert reduced[0][1] == reduced[1][1]


@pytest.mark.slow
def test_quantiles_are_within_the_rank_error(reduced):
    old, rollout, mask, *_ = data()
    size = np.sort((old - rollout).abs()[mask].numpy())
    sketch = Distribution.of(torch.tensor(size), tail=True).sketched()
    for name, share, error in zip(QUANTILE, (0.5, 0.9, 0.99, 0.999), (1, 1, 0.1, 0.05), strict=True):
        rank = np.searchsorted(size, reduced[0][1][name]) / len(size)
        assert abs(rank - share) <= error * max(sketch.rank_error, 0.003), name
    whole = mismatch.compare(old, rollout, mask)
    for name in set(SKETCHED) - set(QUANTILE):
        assert reduced[0][1][name] == pytest.approx(whole[name], rel=0.03), name


@pytest.mark.slow
def test_a_rank_without_tokens_takes_part(reduced):
    old, rollout, mask, *_ = data()
    whole = mismatch.compare(old[5:], rollout[5:], mask[5:], positions=False)
    assert reduced[0][4]["k3"] == pytest.approx(whole["k3"]) and reduced[0][4]["tokens"] == whole["tokens"]


@pytest.mark.slow
def test_normalisation_over_ranks_gives_a_global_mean_of_one(reduced):
    assert sum(r[2] for r in reduced) / sum(r[3] for r in reduced) == pytest.approx(1.0, rel=1e-6)


def test_a_single_process_keeps_exact_quantiles():
    old, rollout, mask, *_ = data()
    stats = mismatch.collect(old, rollout, mask)
    assert mismatch.reduce(stats) is stats


def test_a_sketch_keeps_the_largest_value_and_states_its_error():
    values = torch.arange(200_000).double()[torch.randperm(200_000, generator=torch.Generator().manual_seed(1))]
    exact = Distribution.of(values, tail=True)
    halves = [Distribution.of(v, tail=True).sketched() for v in values.chunk(2)]
    merged = halves[0].merge(halves[1])
    assert merged.quantiles((1.0,)) == [199_999.0]
    assert exact.rank_error == 0.0 < merged.rank_error < 0.01
    assert merged.quantiles((0.999,))[0] == pytest.approx(exact.quantiles((0.999,))[0], rel=1e-4)
    assert merged.trimmed_mean() == pytest.approx(exact.trimmed_mean(), rel=0.01)
    assert all(math.isnan(x) for x in Distribution.of(values[:0], tail=True).sketched().quantiles((0.5,)))


def test_without_datasketches_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketches", None)
    with pytest.raises(RuntimeError, match="pip install datasketches"):
        Distribution.of(torch.ones(3), tail=True).sketched()
