"""Device code of one tile of logits: the product, the transform, the sums of its softmax, the gradient of its logits.

One law for every kernel: a logit is one chain of tensor-core instructions over the hidden size, BLOCK_K elements at a time and in
order, in float32. Tokens are the rows of a tile and vocabulary its columns, whatever the number of rows, so a logit's bits depend
on its row and on its weight alone. Sums over a tile's columns are one fixed tree; tiles are added in the order of the vocabulary.

N tokens, D hidden, V vocabulary; a tile is BLOCK_N tokens by BLOCK_V columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(tile, rows, columns, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr):
    """(first row, first column) of a tile. Consecutive tiles share GROUP blocks of rows and one weight, which stay in the L2."""
    high, wide = tl.cdiv(rows, BLOCK_N), tl.cdiv(columns, BLOCK_V)
    group = tile // (GROUP * wide)
    first = group * GROUP
    height = tl.minimum(high - first, GROUP)
    inside = tile % (GROUP * wide)
    return (first + inside % height) * BLOCK_N, (inside // height) * BLOCK_V


@triton.jit
def product(
    hidden, weight, first_row, first_column, rows, columns, size,
    hidden_n, hidden_d, weight_v, weight_d,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, DESCRIBED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """hidden @ weight.T of one tile in float32. Rows and columns beyond the ends hold copies of the last ones.

    EVEN: the hidden size is a multiple of BLOCK_K. DESCRIBED: operands are tensor descriptors (TMA; zeros beyond the ends).
    WIDEN: multiply float32 copies, for the interpreter, whose bfloat16 products are garbage.
    """
    sums = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    inner = tl.arange(0, BLOCK_K)
    if not DESCRIBED:
        row = tl.minimum(first_row + tl.arange(0, BLOCK_N), rows - 1).to(tl.int64)
        column = tl.minimum(first_column + tl.arange(0, BLOCK_V), columns - 1).to(tl.int64)
        of_hidden = hidden + row[:, None] * hidden_n + inner[None, :].to(tl.int64) * hidden_d
        of_weight = weight + column[None, :] * weight_v + inner[:, None].to(tl.int64) * weight_d
    for start in tl.range(0, size, BLOCK_K):
        if DESCRIBED:
            h = hidden.load([first_row, start])
            w = weight.load([first_column, start]).T
        elif EVEN:
            h = tl.load(of_hidden)
            w = tl.load(of_weight)
        else:
            h = tl.load(of_hidden, mask=inner[None, :] < size - start, other=0.0)
            w = tl.load(of_weight, mask=inner[:, None] < size - start, other=0.0)
        if WIDEN:
            h, w = h.to(tl.float32), w.to(tl.float32)
        sums = tl.dot(h, w, sums, input_precision="ieee")
        if not DESCRIBED:
            of_hidden += BLOCK_K * hidden_d
            of_weight += BLOCK_K * weight_d
    return sums


@triton.jit
def tanh(x):
    """Within 2e-7 of the hyperbolic tangent, without a library (the interpreter has none); NaN stays NaN."""
    size = tl.abs(x)
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    ends = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(size, 10.0)) + 1.0)
    return tl.where(size < 0.3, series, tl.where(x != x, x, tl.where(x < 0, -ends, ends)))


@triton.jit
def halved(x):
    """The left and the right half of a tile's columns. A thread keeps what it holds."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def quartered(x):
    """Four quarters of a tile's columns: what follows a product takes one after the other, or it would not fit the registers."""
    left, right = halved(x)
    first, second = halved(left)
    third, fourth = halved(right)
    return first, second, third, fourth


@triton.jit
def transformed(x, bias, heat, column, columns, soft_cap, logit_scale, CAPPED: tl.constexpr):
    """(logits as the softmax sees them, their slope in the product): bias, soft cap, scale, division by the temperature.

    bias, and heat [rows], the temperature, may be None. The slope is [rows, columns] where CAPPED, else [rows, 1].
    """
    if bias is not None:
        x += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    slope = tl.zeros((x.shape[0], 1), tl.float32) + logit_scale
    if CAPPED:
        bent = tanh(tl.math.div_rn(x, tl.zeros_like(x) + soft_cap))
        x = bent * soft_cap
    x = x * logit_scale
    if heat is not None:
        x = tl.math.div_rn(x, tl.zeros_like(x) + heat[:, None])
        slope = slope / heat[:, None]
    if CAPPED:
        slope = slope * (1.0 - bent * bent)
    return x, slope


@triton.jit
def part_sums(x, MEAN: tl.constexpr):
    """(peak, sum of exp(x - peak), sum of (x - peak) exp(x - peak)) of each row; x is -inf where there is no column."""
    peak = tl.max(x, 1)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    less = x - base[:, None]
    part = tl.exp(less)
    total = tl.sum(part, 1)
    weighted = total
    if MEAN:
        weighted = tl.sum(tl.where(part == 0.0, 0.0, less * part), 1)
    return peak, total, weighted


@triton.jit
def joined(peak, total, weighted, next_peak, next_total, next_weighted, MEAN: tl.constexpr):
    """The three sums of two parts taken together."""
    highest = tl.maximum(peak, next_peak)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    share, next_share = tl.exp(peak - base), tl.exp(next_peak - base)
    if MEAN:
        mine = tl.where(share == 0.0, 0.0, share * (weighted + (peak - base) * total))
        weighted = mine + tl.where(
            next_share == 0.0, 0.0, next_share * (next_weighted + (next_peak - base) * next_total)
        )
    return highest, share * total + next_share * next_total, weighted


@triton.jit
def logit_gradient(x, slope, hit, lse, logprob_grad, entropy, entropy_grad, ENTROPY: tl.constexpr):
    """Gradient for the product: g (onehot - p) - h p (log p + H), times the slope. Everything but x and hit is per row."""
    p = tl.exp(x - lse[:, None])
    if ENTROPY:
        constant = logprob_grad + entropy_grad * (entropy - lse)
        grad = -(constant[:, None] + entropy_grad[:, None] * x) * p
    else:
        grad = -logprob_grad[:, None] * p
    return (grad + tl.where(hit, logprob_grad[:, None], 0.0)) * slope
