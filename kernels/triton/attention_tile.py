"""Attention of a tile of queries over a run of paged KV: what the kernels of `attention` are made of.

A tile is BLOCK_M rows: neighbouring queries of one sequence, each with the GROUP query heads that read one KV head.
Row m is query m // GROUP of the tile with head m % GROUP of the group, so K and V are read once for all of them.

Softmax is computed online (https://arxiv.org/abs/1805.02867, https://arxiv.org/abs/2205.14135), in powers of two:
scores are kept times log2 e.
"""

import triton
import triton.language as tl

# Of products of float32 on matrix units: three of 11 bits each, exact to about 2 ** -21. (Others' are as they are.)
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def find_sequence(query_start, tile, num_sequences, BLOCK_Q: tl.constexpr):
    """Whose tile this is. Sequence s owns the tiles from query_start[s] // BLOCK_Q + s on: enough for its queries,
    one more at times. So T // BLOCK_Q + S tiles suffice, whatever the lengths are."""
    low = tl.full([], 0, tl.int32)
    high = low + num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def fold(scores, top, mass):
    """One step of a softmax. scores: [M, N], -infinity where hidden; top, mass: [M], the rows' maxima and sums of
    weights so far. Returns (weights [M, N], what earlier sums shrink by [M], top, mass)."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # of a row that has seen nothing yet
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    return weights, shrink, new_top, mass * shrink + tl.sum(weights, axis=1)


@triton.jit
def cap(scores, soft_cap):
    """c * tanh(score / c), by the logistic function; the result times log2 e."""
    logistic = 1.0 / (1.0 + tl.exp2(-2.0 * 1.4426950408889634 / soft_cap * scores))
    return (soft_cap * 1.4426950408889634) * (2.0 * logistic - 1.0)


@triton.jit
def load(pointers, mask, MASKED: tl.constexpr):
    """0 where masked out. A mask that is true everywhere still costs instructions: MASKED False leaves it out."""
    if MASKED:
        return tl.load(pointers, mask=mask, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def sweep(
    top,  # [BLOCK_M], see `fold`
    mass,
    sums,  # [BLOCK_M, HEAD] float32, weighted sums of values
    query,  # [BLOCK_M, HEAD]
    positions,  # [BLOCK_M], of the rows' tokens in their sequence
    keys,  # of the KV head in block 0: [BLOCK_SIZE, head_size]; another block is block_stride further
    values,
    key_scales,  # likewise [BLOCK_SIZE] float32, scale_stride further, if QUANTIZED
    value_scales,
    table,  # the sequence's block table
    block_stride,
    scale_stride,
    begin,  # the run: KV positions [begin, end) in steps of BLOCK_N
    end,
    low,  # of these, only positions [low, high) may be read
    high,
    window,
    scale,  # of scores; times log2 e unless CAPPED
    soft_cap,
    head_size: tl.constexpr,
    HEAD: tl.constexpr,  # padded to a power of two
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUANTIZED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,  # False: every row sees all of every step
):
    """(top, mass, sums) after the run."""
    component = tl.arange(0, HEAD)
    for start in tl.range(begin, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        # A block before the window may be another sequence's by now, and a slot that nobody wrote may hold NaN.
        readable = (position >= low) & (position < high)
        block = load(table + position // BLOCK_SIZE, readable, MASKED).to(tl.int64)
        slot = block * block_stride + position % BLOCK_SIZE * head_size
        key_mask = readable[None, :] & (component < head_size)[:, None]
        value_mask = readable[:, None] & (component < head_size)[None, :]
        key = load(keys + slot[None, :] + component[:, None], key_mask, MASKED or head_size != HEAD)
        scores = tl.dot(query, key.to(query.dtype), input_precision=PRECISION) * scale
        if QUANTIZED:
            at = block * scale_stride + position % BLOCK_SIZE
            scores *= load(key_scales + at, readable, MASKED)[None, :]
        if CAPPED:
            scores = cap(scores, soft_cap)
        if MASKED:
            seen = readable[None, :] & (position[None, :] <= positions[:, None])
            if WINDOWED:
                seen = seen & (position[None, :] > positions[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        weights, shrink, top, mass = fold(scores, top, mass)
        if QUANTIZED:
            weights *= load(value_scales + at, readable, MASKED)[None, :]
        value = load(values + slot[:, None] + component[None, :], value_mask, MASKED or head_size != HEAD)
        sums = tl.dot(weights.to(query.dtype), value.to(query.dtype), sums * shrink[:, None], input_precision=PRECISION)
    return top, mass, sums
