"""The kernels: logits, the softmax's sums over the vocabulary, the gradient of the logits; products in them or read from memory.

A program takes one tile after the other, `programs` apart: as many programs as tiles, or one for each multiprocessor.
N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlalign.head.triton.tile_code import logit_gradient, place, product, tile_sums, transformed


@triton.jit
def logits_kernel(
    hidden, weight, bias, out, rows, columns, size,
    hidden_n, hidden_d, weight_v, weight_d, out_n,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, DESCRIBED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out[n, v] = sum over d of hidden[n, d] weight[v, d], plus the bias, in float32."""
    tiles = tl.cdiv(rows, BLOCK_N) * tl.cdiv(columns, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=DESCRIBED):
        first_row, first_column = place(tile, rows, columns, BLOCK_N, BLOCK_V, GROUP)
        x = product(
            hidden, weight, first_row, first_column, rows, columns, size,
            hidden_n, hidden_d, weight_v, weight_d, BLOCK_N, BLOCK_V, BLOCK_K, EVEN, DESCRIBED, WIDEN,
        )  # fmt: skip
        row, column = first_row + tl.arange(0, BLOCK_N), first_column + tl.arange(0, BLOCK_V)
        if bias is not None:
            x += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        place_of = out + row[:, None].to(tl.int64) * out_n + column[None, :]
        tl.store(place_of, x, mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def sums_kernel(
    hidden, weight, made, bias, temperature, target, peaks, totals, weights, target_logit,
    rows, columns, size, first_id, soft_cap, logit_scale,
    hidden_n, hidden_d, weight_v, weight_d, made_n, sums_t,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, DESCRIBED: tl.constexpr, WIDEN: tl.constexpr, CAPPED: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """peaks, totals, weights [tiles of the vocabulary, N]: the three sums of each tile; target_logit [N] where it lies in one.

    made: logits [N, V] without bias that exist already, or None: they are formed here and never leave the registers.
    first_id: the id of column 0; sums_t: from one tile's sums to the next.
    """
    tiles = tl.cdiv(rows, BLOCK_N) * tl.cdiv(columns, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=DESCRIBED):
        first_row, first_column = place(tile, rows, columns, BLOCK_N, BLOCK_V, GROUP)
        row, column = first_row + tl.arange(0, BLOCK_N), first_column + tl.arange(0, BLOCK_V)
        there = (row < rows)[:, None] & (column < columns)[None, :]
        if made is None:
            x = product(
                hidden, weight, first_row, first_column, rows, columns, size,
                hidden_n, hidden_d, weight_v, weight_d, BLOCK_N, BLOCK_V, BLOCK_K, EVEN, DESCRIBED, WIDEN,
            )  # fmt: skip
        else:
            x = tl.load(made + row[:, None].to(tl.int64) * made_n + column[None, :], mask=there, other=0.0)
        x, _ = transformed(x, bias, temperature, row, column, rows, columns, soft_cap, logit_scale, CAPPED)
        wanted = tl.load(target + row, mask=row < rows, other=-1) - first_id - first_column
        hit = tl.arange(0, BLOCK_V)[None, :] == wanted[:, None]
        inside = (wanted >= 0) & (wanted < BLOCK_V) & (wanted + first_column < columns) & (row < rows)
        tl.store(target_logit + row, tl.sum(tl.where(hit, x, 0.0), 1), mask=inside)
        x = tl.where((column < columns)[None, :], x, float("-inf"))
        peak, total, weighted = tile_sums(x, MEAN)
        of_tile = (first_column // BLOCK_V).to(tl.int64) * sums_t + row
        tl.store(peaks + of_tile, peak, mask=row < rows)
        tl.store(totals + of_tile, total, mask=row < rows)
        if MEAN:
            tl.store(weights + of_tile, weighted, mask=row < rows)


@triton.jit
def merge_kernel(
    peaks, totals, weights, lse, mean, rows, tiles, sums_t,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """lse [N] and, where MEAN, the mean logit [N] of the tiles' sums, added in the order of the vocabulary."""
    row, step = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    highest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for start in tl.range(0, tiles, BLOCK_T):
        there = (start + step < tiles)[:, None] & (row < rows)[None, :]
        where = (start + step)[:, None].to(tl.int64) * sums_t + row[None, :]
        highest = tl.maximum(highest, tl.max(tl.load(peaks + where, mask=there, other=float("-inf")), 0))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, tiles, BLOCK_T):
        there = (start + step < tiles)[:, None] & (row < rows)[None, :]
        where = (start + step)[:, None].to(tl.int64) * sums_t + row[None, :]
        part = tl.load(totals + where, mask=there, other=0.0)
        less = tl.load(peaks + where, mask=there, other=float("-inf")) - base[None, :]
        share = tl.exp(less)
        total += tl.sum(share * part, 0)
        if MEAN:
            of_tile = tl.load(weights + where, mask=there, other=0.0)
            weighted += tl.sum(tl.where(share == 0.0, 0.0, share * (of_tile + less * part)), 0)
    tl.store(lse + row, tl.log(total) + base, mask=row < rows)
    if MEAN:
        tl.store(mean + row, weighted / total + base, mask=row < rows)


@triton.jit
def gradient_kernel(
    hidden, weight, made, bias, temperature, target, lse, logprob_grad, entropy, entropy_grad, out, bias_grad,
    rows, columns, size, first_id, soft_cap, logit_scale,
    hidden_n, hidden_d, weight_v, weight_d, made_n, out_n, bias_grad_n,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, DESCRIBED: tl.constexpr, WIDEN: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """out [N, V] in its own dtype: the gradient of the loss for each product, rounded once; made as in sums_kernel.

    bias_grad [blocks of tokens, V] float32 or None: that gradient, unrounded and before the slope of nothing, summed over a block.
    """
    tiles = tl.cdiv(rows, BLOCK_N) * tl.cdiv(columns, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=DESCRIBED):
        first_row, first_column = place(tile, rows, columns, BLOCK_N, BLOCK_V, GROUP)
        row, column = first_row + tl.arange(0, BLOCK_N), first_column + tl.arange(0, BLOCK_V)
        there = (row < rows)[:, None] & (column < columns)[None, :]
        if made is None:
            x = product(
                hidden, weight, first_row, first_column, rows, columns, size,
                hidden_n, hidden_d, weight_v, weight_d, BLOCK_N, BLOCK_V, BLOCK_K, EVEN, DESCRIBED, WIDEN,
            )  # fmt: skip
        else:
            x = tl.load(made + row[:, None].to(tl.int64) * made_n + column[None, :], mask=there, other=0.0)
        x, slope = transformed(x, bias, temperature, row, column, rows, columns, soft_cap, logit_scale, CAPPED)
        wanted = tl.load(target + row, mask=row < rows, other=-1) - first_id - first_column
        hit = tl.arange(0, BLOCK_V)[None, :] == wanted[:, None]
        of_row = row < rows
        grad = tl.load(logprob_grad + row, mask=of_row, other=0.0)
        of_lse = tl.load(lse + row, mask=of_row, other=0.0)
        if entropy_grad is not None:
            fall = tl.load(entropy_grad + row, mask=of_row, other=0.0)
            level = tl.load(entropy + row, mask=of_row, other=0.0)
            slopes = logit_gradient(x, slope, hit, of_lse, grad, level, fall, True)
        else:
            slopes = logit_gradient(x, slope, hit, of_lse, grad, grad, grad, False)
        place_of = out + row[:, None].to(tl.int64) * out_n + column[None, :]
        tl.store(place_of, slopes.to(out.dtype.element_ty), mask=there)
        if bias_grad is not None:
            down = tl.sum(tl.where(of_row[:, None], slopes, 0.0), 0)
            tl.store(
                bias_grad + (first_row // BLOCK_N).to(tl.int64) * bias_grad_n + column, down, mask=column < columns
            )
