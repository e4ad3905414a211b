"""Vocabulary-parallel logprobs over two gloo ranks equal those of one rank."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlalign.logprobs import token_logprobs
from rlalign.logprobs.truncation import Truncation, kept_sets
from rlalign.logprobs.vocab_parallel import VocabShard

V, D = 210, 24  # the weight has 210 rows, of which 150 (or so) are real
CASES = [
    {"entropy": True},
    {"entropy": True, "soft_cap": 4.0, "logit_scale": 0.5, "temperature": 0.7, "vocab_size": 150},
    {"entropy": True, "kept": True, "temperature": 0.7},
    {"entropy": True, "vocab_size": 90, "chunk": 3},  # the second rank holds padding only
    {"entropy": True, "keep_mib": 1, "temperature": 0.7},
]


MASK = torch.ones(2, 9, dtype=torch.bool).index_fill(1, torch.tensor([0]), False)
TRUNCATED = {
    "mask": MASK, "truncation": Truncation(top_k=40, top_p=0.9, min_p=0.01), "temperature": 0.7, "vocab_size": 150, "chunk": 5
}  # fmt: skip


def make(dtype: torch.dtype, vocab_size: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, D, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=g).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=g).requires_grad_()
    return hidden, weight, bias, torch.randint(0, vocab_size, (2, 9), generator=g)


def scored(hidden, weight, bias, ids, options, shard=None) -> tuple[torch.Tensor, ...]:
    """logprobs, entropy, and the gradients of an uneven loss for hidden, weight, bias."""
    if "kept" in options:  # sets that lie on one rank, on both, and around the border
        steps = torch.tensor([0, 1, 2, 40, -1000])
        options = options | {"kept": (ids[..., None] + steps).clamp(-1, V - 1)}
    logprobs, entropy = token_logprobs(hidden, weight, ids, bias=bias, shard=shard, **options)
    ramp = torch.linspace(-1, 2, 18).view(2, 9)
    grads = torch.autograd.grad((ramp * logprobs + ramp.flip(1) * entropy).sum(), (hidden, weight, bias))
    return logprobs.detach(), entropy.detach(), *grads


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results = []
    for options in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            hidden, weight, bias, ids = make(dtype, options.get("vocab_size", V))
            rows = slice(0, 100) if rank == 0 else slice(100, V)  # uneven slices
            part = [x[rows].detach().requires_grad_() for x in (weight, bias)]
            results.append(scored(hidden, *part, ids, options, VocabShard(start=rows.start, total=V)))
    hidden, weight, bias, ids = make(torch.float32, 150)
    rows = slice(0, 100) if rank == 0 else slice(100, V)
    found = kept_sets(
        hidden, weight[rows], ids, bias=bias[rows], shard=VocabShard(start=rows.start, total=V), **TRUNCATED
    )
    torch.save((found.kept.ids_E, found.kept.count_BL, found.log_mass_BL), f"{folder}/sets-{rank}.pt")
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[torch.Tensor, ...]]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.start_processes(worker, args=(str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
def test_two_ranks_equal_one(by_rank) -> None:
    index = 0
    for options in CASES:
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3)):
            hidden, weight, bias, ids = make(dtype, options.get("vocab_size", V))
            want = scored(hidden, weight, bias, ids, options)
            first, second = by_rank[0][index], by_rank[1][index]
            joined = (*first[:3], torch.cat((first[3], second[3])), torch.cat((first[4], second[4])))
            for got, exact in zip(joined[:2], want[:2], strict=True):
                torch.testing.assert_close(got, exact, rtol=1e-5, atol=3e-5)
            for got, exact in zip(joined[2:], want[2:], strict=True):
                assert got.dtype == exact.dtype
                assert (got.double() - exact.double()).norm() <= bound * exact.double().norm()
            index += 1


@pytest.mark.slow
def test_two_ranks_find_the_sets_of_one(by_rank, tmp_path_factory) -> None:
    folder = next(tmp_path_factory.getbasetemp().glob("ranks*"))
    hidden, weight, bias, ids = make(torch.float32, 150)
    want = kept_sets(hidden, weight, ids, bias=bias, **TRUNCATED)
    for rank in (0, 1):
        ids_E, count_BL, mass_BL = torch.load(folder / f"sets-{rank}.pt")
        assert torch.equal(ids_E, want.kept.ids_E) and torch.equal(count_BL, want.kept.count_BL)
        torch.testing.assert_close(mass_BL, want.log_mass_BL, atol=2e-6, rtol=0)


@pytest.mark.slow
def test_ranks_hold_identical_results(by_rank) -> None:
    for first, second in zip(*by_rank, strict=True):
        for a, b in zip(first[:3], second[:3], strict=True):
            assert torch.equal(a, b)


def test_a_shard_cannot_mirror_whole_rows() -> None:
    hidden, weight, _, ids = make(torch.float32, V)
    with pytest.raises(ValueError, match="gather the weight"):
        token_logprobs(hidden, weight, ids, mode="exact_mirror", shard=VocabShard(0, V))
