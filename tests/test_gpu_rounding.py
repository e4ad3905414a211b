"""Emulated kernels of benchmarks/gpu_rounding.py against scalar arithmetic in exact fractions, and the variants against them."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from benchmarks import gpu_rounding
from rlalign.trainer.rounding.variants import ADD_AND_NORM, MODEL, ROPE, ROUNDED_ONCE

GIVEN = gpu_rounding.inputs(6, 512, e=16)


def bf16(x: Fraction) -> Fraction:
    """The nearest number with eight significant bits, ties to even; exponents without a limit."""
    if not x:
        return x
    exponent = abs(x).numerator.bit_length() - abs(x).denominator.bit_length()
    exponent -= Fraction(2) ** exponent > abs(x)
    unit = Fraction(2) ** (exponent - 7)
    return round(x / unit) * unit


def exact(x: torch.Tensor) -> list[Fraction]:
    return [Fraction(v) for v in x.flatten().tolist()]


def test_a_packed_addition_rounds_once():
    found, stream, branch = (exact(x) for x in (GIVEN.stream + GIVEN.branch, GIVEN.stream, GIVEN.branch))
    assert found == [bf16(x + y) for x, y in zip(stream, branch, strict=True)]


def test_a_fused_multiply_add_changes_no_sum_of_squares():
    for x in exact((GIVEN.stream + GIVEN.branch)[0]):
        assert np.float32(float(x)) ** 2 == x * x, "the square of a bf16 number is a float32 number"


@pytest.mark.parametrize("threads", [40, 256])
def test_squares_are_added_thread_by_thread_then_by_shuffles_then_warp_by_warp(threads):
    rounded = (GIVEN.stream + GIVEN.branch).float()
    for row, found in zip(rounded.numpy(), gpu_rounding.sums_of_squares(rounded, threads).numpy(), strict=True):
        held = [np.float32(0)] * -(-threads // 32) * 32
        for vector in range(len(row) // 8):
            inner = np.float32(0)
            for i in range(0, 8, 2):
                x, y = row[8 * vector + i], row[8 * vector + i + 1]
                inner = np.float32(inner + np.float32(x * x + y * y))
            held[vector % threads] = np.float32(held[vector % threads] + inner)
        for offset in (1, 2, 4, 8, 16):
            held = [np.float32(x + held[i + offset]) if i % 32 + offset < 32 else x for i, x in enumerate(held)]
        total = held[0]
        for warp in range(32, len(held), 32):
            total = np.float32(total + held[warp])
        assert found == total


def test_rope_rounds_the_exact_difference_once():
    found = gpu_rounding.rope(GIVEN)
    (x, y), cos, sin = (
        GIVEN.heads.chunk(2, dim=-1),
        GIVEN.cos[:, :8].expand(4, -1, -1),
        GIVEN.sin[:, :8].expand(4, -1, -1),
    )
    both = zip(*(exact(t) for t in (x, y, cos, sin)), strict=True)
    twice = [
        abs(float(f) - float(bf16(a * c - b * s))) for f, (a, b, c, s) in zip(exact(found[..., :8]), both, strict=True)
    ]
    assert max(twice) == 0.0  # float32 between is of no consequence here


@pytest.mark.parametrize("which", list(gpu_rounding.EMULATED))
def test_the_variant_that_rounds_where_a_kernel_does_has_its_bits_and_no_other_is_near(which):
    given = gpu_rounding.inputs(48, 1024)
    emulated = gpu_rounding.EMULATED[which](given)
    found = {name: gpu_rounding.differing(x, emulated) for name, x in gpu_rounding.ways(which[0], given).items()}
    expected = gpu_rounding.EXPECTED[which]
    assert found.pop(expected) < 2e-4  # float32 sums and functions may end in another last bit
    assert min(found.values()) > 0.1


def test_what_cuda_leaves_open_of_a_reciprocal_root_moves_few_elements():
    given = gpu_rounding.inputs(48, 1024)
    model = gpu_rounding.ways(ADD_AND_NORM, given)[MODEL]
    moved = [gpu_rounding.differing(gpu_rounding.vllm_add_and_norm(given, units), model) for units in (-2, 0, 2)]
    assert max(moved) < 1e-3 and moved[1] <= min(moved)


def test_rows_name_the_variant_and_a_table_shows_them():
    found = list(gpu_rounding.rows(torch.device("cpu")))
    assert {row["ran"] for row in found} == {"emulated"} and len(found) == 15
    table = "\n".join(gpu_rounding.markdown(found))
    assert f"| {ROPE} | vLLM | emulated | {ROUNDED_ONCE} * | 0.000% | 0.000% |" in table
    failed = gpu_rounding.markdown([{"op": ROPE, "kernel": "vLLM", "expected": MODEL, "status": "ImportError: no"}])
    assert "| rope | vLLM | ImportError: no | | | |" in failed and gpu_rounding.markdown([]) == []
