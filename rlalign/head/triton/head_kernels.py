"""The kernels: logits, the softmax's sums over the vocabulary, the gradient of the logits; products in them or read from memory.

A program takes one tile after the other, `programs` apart: as many programs as tiles, or one for each multiprocessor. What varies
from call to call and aligns nothing, rows and first id, is no reason to compile again.
N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlalign.head.triton.tile_code import joined, logit_gradient, part_sums, place, product, quartered, transformed


@triton.jit
def put_logits(x, bias, out, row, column, rows, columns, out_n):
    """Store a part of a tile."""
    if bias is not None:
        x += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    place_of = out + row[:, None].to(tl.int64) * out_n + column[None, :]
    tl.store(place_of, x, mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["rows"])
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
        row, column = first_row + tl.arange(0, BLOCK_N), first_column + tl.arange(0, BLOCK_V // 4)
        first, second, third, fourth = quartered(x)
        put_logits(first, bias, out, row, column, rows, columns, out_n)
        put_logits(second, bias, out, row, column + BLOCK_V // 4, rows, columns, out_n)
        put_logits(third, bias, out, row, column + BLOCK_V // 2, rows, columns, out_n)
        put_logits(fourth, bias, out, row, column + BLOCK_V // 4 * 3, rows, columns, out_n)


@triton.jit
def read_part(made, row, column, rows, columns, made_n):
    """A part of a tile of products from memory."""
    there = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(made + row[:, None].to(tl.int64) * made_n + column[None, :], mask=there, other=0.0)


@triton.jit
def read_quarters(made, row, column, rows, columns, made_n, QUARTER: tl.constexpr):
    """A tile of products from memory, in quarters."""
    first = read_part(made, row, column, rows, columns, made_n)
    second = read_part(made, row, column + QUARTER, rows, columns, made_n)
    third = read_part(made, row, column + 2 * QUARTER, rows, columns, made_n)
    return first, second, third, read_part(made, row, column + 3 * QUARTER, rows, columns, made_n)


@triton.jit
def barred(x, allowed, row, column, rows, columns, allowed_n):
    """A part of a tile of logits without the ids that a token's kept set leaves out: probability exactly 0, and no NaN from it."""
    if allowed is not None:
        there = (row < rows)[:, None] & (column < columns)[None, :]
        keeps = tl.load(allowed + row[:, None].to(tl.int64) * allowed_n + column[None, :], mask=there, other=0)
        x = tl.where(keeps != 0, x, -1e30)
    return x


@triton.jit
def sum_part(
    x, bias, heat, allowed, wanted, target_logit, kept, row, column, rows, columns, allowed_n, kept_n, soft_cap, logit_scale,
    CAPPED: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """The three sums of a part of a tile; its products into `kept`, unless that is None, and the logit of the wanted column."""
    if kept is not None:
        put_logits(x, None, kept, row, column, rows, columns, kept_n)
    x, _ = transformed(x, bias, heat, column, columns, soft_cap, logit_scale, CAPPED)
    x = barred(x, allowed, row, column, rows, columns, allowed_n)
    hit = column[None, :] == wanted[:, None]
    inside = (wanted >= tl.min(column, 0)) & (wanted <= tl.max(column, 0)) & (wanted < columns) & (row < rows)
    tl.store(target_logit + row, tl.sum(tl.where(hit, x, 0.0), 1), mask=inside)
    return part_sums(tl.where((column < columns)[None, :], x, float("-inf")), MEAN)


@triton.jit(do_not_specialize=["rows", "first_id"])
def sums_kernel(
    hidden, weight, made, kept, bias, temperature, allowed, target, peaks, totals, weights, target_logit,
    rows, columns, size, first_id, soft_cap, logit_scale,
    hidden_n, hidden_d, weight_v, weight_d, made_n, allowed_n, kept_n, sums_t,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, DESCRIBED: tl.constexpr, WIDEN: tl.constexpr, CAPPED: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """peaks, totals, weights [tiles of the vocabulary, N]: the three sums of each tile; target_logit [N] where it lies in one.

    made: products [N, V] that exist already, or None: they are formed here and never leave the registers, unless `kept` [N, V]
    wants them. allowed [N, V] bytes or None: zero where a token's softmax leaves an id out. first_id: the id of column 0; sums_t:
    from one tile's sums to the next.
    """
    tiles = tl.cdiv(rows, BLOCK_N) * tl.cdiv(columns, BLOCK_V)
    QUARTER: tl.constexpr = BLOCK_V // 4
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=DESCRIBED):
        first_row, first_column = place(tile, rows, columns, BLOCK_N, BLOCK_V, GROUP)
        row, column = first_row + tl.arange(0, BLOCK_N), first_column + tl.arange(0, QUARTER)
        if made is None:
            x = product(
                hidden, weight, first_row, first_column, rows, columns, size,
                hidden_n, hidden_d, weight_v, weight_d, BLOCK_N, BLOCK_V, BLOCK_K, EVEN, DESCRIBED, WIDEN,
            )  # fmt: skip
            first, second, third, fourth = quartered(x)
        else:
            first, second, third, fourth = read_quarters(made, row, column, rows, columns, made_n, QUARTER)
        wanted = tl.load(target + row, mask=row < rows, other=-1) - first_id
        heat = temperature
        if temperature is not None:
            heat = tl.load(temperature + row, mask=row < rows, other=1.0)
        p, t, w = sum_part(
            first, bias, heat, allowed, wanted, target_logit, kept, row, column, rows, columns, allowed_n,
            kept_n, soft_cap, logit_scale, CAPPED, MEAN,
        )  # fmt: skip
        p2, t2, w2 = sum_part(
            second, bias, heat, allowed, wanted, target_logit, kept, row, column + QUARTER, rows, columns, allowed_n,
            kept_n, soft_cap, logit_scale, CAPPED, MEAN,
        )  # fmt: skip
        p, t, w = joined(p, t, w, p2, t2, w2, MEAN)
        p2, t2, w2 = sum_part(
            third, bias, heat, allowed, wanted, target_logit, kept, row, column + 2 * QUARTER, rows, columns, allowed_n,
            kept_n, soft_cap, logit_scale, CAPPED, MEAN,
        )  # fmt: skip
        p, t, w = joined(p, t, w, p2, t2, w2, MEAN)
        p2, t2, w2 = sum_part(
            fourth, bias, heat, allowed, wanted, target_logit, kept, row, column + 3 * QUARTER, rows, columns, allowed_n,
            kept_n, soft_cap, logit_scale, CAPPED, MEAN,
        )  # fmt: skip
        p, t, w = joined(p, t, w, p2, t2, w2, MEAN)
        of_tile = (first_column // BLOCK_V).to(tl.int64) * sums_t + row
        tl.store(peaks + of_tile, p, mask=row < rows)
        tl.store(totals + of_tile, t, mask=row < rows)
        if MEAN:
            tl.store(weights + of_tile, w, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "tiles"])
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
def gradient_part(
    x, bias, heat, allowed, wanted, of_lse, grad, level, fall, out, down, row, column, rows, columns, allowed_n, out_n,
    soft_cap, logit_scale,
    CAPPED: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Store the gradient for a part of a tile of products; its sum over the rows into `down`, unless that is None."""
    x, slope = transformed(x, bias, heat, column, columns, soft_cap, logit_scale, CAPPED)
    x = barred(x, allowed, row, column, rows, columns, allowed_n)
    slopes = logit_gradient(x, slope, column[None, :] == wanted[:, None], of_lse, grad, level, fall, ENTROPY)
    place_of = out + row[:, None].to(tl.int64) * out_n + column[None, :]
    tl.store(place_of, slopes.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])
    if down is not None:
        tl.store(down + column, tl.sum(tl.where((row < rows)[:, None], slopes, 0.0), 0), mask=column < columns)


@triton.jit(do_not_specialize=["rows", "first_id"])
def gradient_kernel(
    hidden, weight, made, bias, temperature, allowed, target, lse, logprob_grad, entropy, entropy_grad, out, bias_grad,
    rows, columns, size, first_id, soft_cap, logit_scale,
    hidden_n, hidden_d, weight_v, weight_d, made_n, allowed_n, out_n, bias_grad_n,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, DESCRIBED: tl.constexpr, WIDEN: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """out [N, V] in its own dtype: the gradient of the loss for each product, rounded once; made as in sums_kernel.

    bias_grad [blocks of tokens, V] float32 or None: the same unrounded, summed over each block's tokens.
    """
    tiles = tl.cdiv(rows, BLOCK_N) * tl.cdiv(columns, BLOCK_V)
    QUARTER: tl.constexpr = BLOCK_V // 4
    ENTROPY: tl.constexpr = entropy_grad is not None
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=DESCRIBED):
        first_row, first_column = place(tile, rows, columns, BLOCK_N, BLOCK_V, GROUP)
        row, column = first_row + tl.arange(0, BLOCK_N), first_column + tl.arange(0, QUARTER)
        if made is None:
            x = product(
                hidden, weight, first_row, first_column, rows, columns, size,
                hidden_n, hidden_d, weight_v, weight_d, BLOCK_N, BLOCK_V, BLOCK_K, EVEN, DESCRIBED, WIDEN,
            )  # fmt: skip
            first, second, third, fourth = quartered(x)
        else:
            first, second, third, fourth = read_quarters(made, row, column, rows, columns, made_n, QUARTER)
        there = row < rows
        wanted = tl.load(target + row, mask=there, other=-1) - first_id
        grad = tl.load(logprob_grad + row, mask=there, other=0.0)
        of_lse = tl.load(lse + row, mask=there, other=0.0)
        heat, fall, level, down = temperature, grad, grad, bias_grad
        if temperature is not None:
            heat = tl.load(temperature + row, mask=there, other=1.0)
        if ENTROPY:
            fall = tl.load(entropy_grad + row, mask=there, other=0.0)
            level = tl.load(entropy + row, mask=there, other=0.0)
        if bias_grad is not None:
            down = bias_grad + (first_row // BLOCK_N).to(tl.int64) * bias_grad_n
        gradient_part(
            first, bias, heat, allowed, wanted, of_lse, grad, level, fall, out, down, row, column, rows, columns,
            allowed_n, out_n, soft_cap, logit_scale, CAPPED, ENTROPY,
        )  # fmt: skip
        gradient_part(
            second, bias, heat, allowed, wanted, of_lse, grad, level, fall, out, down, row, column + QUARTER, rows, columns,
            allowed_n, out_n, soft_cap, logit_scale, CAPPED, ENTROPY,
        )  # fmt: skip
        gradient_part(
            third, bias, heat, allowed, wanted, of_lse, grad, level, fall, out, down, row, column + 2 * QUARTER, rows, columns,
            allowed_n, out_n, soft_cap, logit_scale, CAPPED, ENTROPY,
        )  # fmt: skip
        gradient_part(
            fourth, bias, heat, allowed, wanted, of_lse, grad, level, fall, out, down, row, column + 3 * QUARTER, rows, columns,
            allowed_n, out_n, soft_cap, logit_scale, CAPPED, ENTROPY,
        )  # fmt: skip
