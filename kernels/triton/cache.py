"""Writing and copying KV in the block pool. Shapes and contracts: `octavo.kernels.ops`.

Layout asked for: key and value caches of the same strides, blocks contiguous.
"""

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakIdKeyDictionary

from octavo.kernels.ref.cache import LARGEST, scaled_parts

COPY_TILE = 4096  # elements that a program copies
WARPS = 4

# What `split_cache` made of caches that are still there: views cost as much to make as all else of a launch.
_parts: WeakIdKeyDictionary = WeakIdKeyDictionary()


@triton.jit
def _quantize(x, LARGEST: tl.constexpr, INTEGERS: tl.constexpr):
    """Rows x [H, D] float32 → numbers up to LARGEST [H, D] float32, and scales [H]. Divides as exactly as `ref`."""
    top = tl.max(tl.abs(x), axis=1)
    spoiled = tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, axis=1) != 0  # NaN is not below infinity either
    inverse = tl.div_rn(tl.full(top.shape, LARGEST, tl.float32), top)
    inverse = tl.where(inverse == float("inf"), 0.0, inverse)  # nothing, or too small to divide by
    scales = tl.where(inverse == 0.0, 0.0, tl.div_rn(top, tl.full(top.shape, LARGEST, tl.float32)))
    values = x * inverse[:, None]
    if INTEGERS:
        values = (values + 12582912.0) - 12582912.0  # 1.5 * 2**23: only whole numbers there, the nearest, ties to even
    return tl.where(spoiled[:, None], 0.0, values), tl.where(spoiled, float("nan"), scales)


@triton.jit
def _write(
    cache,  # block b, head h at b * block_stride + h * head_stride: [BLOCK_SIZE, head_size]
    scales,  # likewise [BLOCK_SIZE] float32, if QUANTIZED
    x,  # this token's [num_heads, head_size], heads x_head apart
    block,
    offset,
    num_heads,
    x_head,
    block_stride,
    head_stride,
    scale_block_stride,
    scale_head_stride,
    head_size: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    QUANTIZED: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGERS: tl.constexpr,
):
    head = tl.arange(0, HEADS)
    component = tl.arange(0, HEAD)
    held = (head < num_heads)[:, None] & (component < head_size)[None, :]
    value = tl.load(x + head[:, None] * x_head + component[None, :], mask=held, other=0.0)
    if QUANTIZED:
        value, scale = _quantize(value.to(tl.float32), LARGEST, INTEGERS)
        at = block * scale_block_stride + head * scale_head_stride + offset
        tl.store(scales + at, scale, mask=head < num_heads)
    at = block * block_stride + head[:, None] * head_stride + offset * head_size + component[None, :]
    tl.store(cache + at, value.to(cache.dtype.element_ty), mask=held)


@triton.jit
def _write_kv(
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    key,  # [T, num_heads, head_size]
    value,
    slot_mapping,  # [T]
    num_heads,
    key_token,
    key_head,
    value_token,
    value_head,
    block_stride,
    head_stride,
    scale_block_stride,
    scale_head_stride,
    head_size: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,  # padded to powers of two
    HEAD: tl.constexpr,
    QUANTIZED: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGERS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        block = slot // BLOCK_SIZE
        offset = slot % BLOCK_SIZE
        if tl.program_id(1) == 0:
            _write(
                key_cache,
                key_scales,
                key + token * key_token,
                block,
                offset,
                num_heads,
                key_head,
                block_stride,
                head_stride,
                scale_block_stride,
                scale_head_stride,
                head_size,
                HEADS,
                HEAD,
                QUANTIZED,
                LARGEST,
                INTEGERS,
            )
        else:
            _write(
                value_cache,
                value_scales,
                value + token * value_token,
                block,
                offset,
                num_heads,
                value_head,
                block_stride,
                head_stride,
                scale_block_stride,
                scale_head_stride,
                head_size,
                HEADS,
                HEAD,
                QUANTIZED,
                LARGEST,
                INTEGERS,
            )


@triton.jit
def _copy_blocks(
    key_cache,
    value_cache,
    pairs,  # [N, 2]: from, to
    block_stride,
    size,  # elements of a block
    TILE: tl.constexpr,
):
    pair = pairs + tl.program_id(0) * 2
    source = tl.load(pair) * block_stride
    destination = tl.load(pair + 1) * block_stride
    element = tl.program_id(1) * TILE + tl.arange(0, TILE)
    held = element < size
    if tl.program_id(2) == 0:
        tl.store(key_cache + destination + element, tl.load(key_cache + source + element, mask=held), mask=held)
    else:
        tl.store(value_cache + destination + element, tl.load(value_cache + source + element, mask=held), mask=held)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    if key.numel() == 0:
        return
    key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (key, value))
    num_tokens, num_heads, head_size = key.shape
    keys, key_scales = split_cache(key_cache)
    values, value_scales = split_cache(value_cache)
    scale_strides = (0, 0) if key_scales is None else key_scales.stride()[:2]
    _write_kv[(num_tokens, 2)](
        keys,
        values,
        key_scales,
        value_scales,
        key,
        value,
        slot_mapping,
        num_heads,
        *key.stride()[:2],
        *value.stride()[:2],
        *keys.stride()[:2],
        *scale_strides,
        head_size,
        BLOCK_SIZE=keys.shape[2],
        HEADS=triton.next_power_of_2(num_heads),
        HEAD=triton.next_power_of_2(head_size),
        QUANTIZED=key_scales is not None,
        LARGEST=LARGEST.get(key_cache.dtype, 0.0),
        INTEGERS=not key_cache.dtype.is_floating_point,
        num_warps=WARPS,
        enable_fp_fusion=False,  # a product added to a number unrounded would round other ties
    )


def copy_blocks(key_cache: torch.Tensor, value_cache: torch.Tensor, pairs: torch.Tensor) -> None:
    if len(pairs) == 0:
        return
    # No type has more to it here than its size; float8 and its like are not known to every GPU.
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[key_cache.itemsize]
    size = key_cache[0].numel()
    _copy_blocks[(len(pairs), triton.cdiv(size, COPY_TILE), 2)](
        key_cache.view(bits),
        value_cache.view(bits),
        pairs.contiguous(),
        key_cache.stride(0),
        size,
        TILE=COPY_TILE,
        num_warps=WARPS,
    )


def split_cache(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values [NB, Hkv, BS, D] and float32 scales [NB, Hkv, BS], None where the cache's type has none. Views.

    With scales, a block's part of a head takes BS * (D + 4) bytes: with BS a multiple of 8 and D even, which all are,
    every head starts at a multiple of 16 bytes, and Triton may load 16 at once; so does, with BS of 16, each head's
    scales, of a D that 4 divides.
    """
    if cache.dtype not in LARGEST:
        return cache, None
    found = _parts.get(cache)
    if found is None:
        found = _parts[cache] = scaled_parts(cache)
    return found
