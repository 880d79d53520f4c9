"""Writing and copying KV in the block pool. Shapes and contracts: `octavo.kernels.ops`."""

import torch

SCALE_BYTES = 4
# Types of caches whose rows have scales → what the largest magnitude of a row becomes.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def scaled_parts(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache with scales [NB, Hkv, BS, D + 4] as values [NB, Hkv, BS, D] and float32 scales [NB, Hkv, BS]. Views."""
    num_blocks, num_heads, block_size, row = cache.shape
    head_size = row - SCALE_BYTES
    heads = cache.view(num_blocks, num_heads, block_size * row)
    values = heads[..., : block_size * head_size].unflatten(-1, (block_size, head_size))
    return values, heads[..., block_size * head_size :].view(torch.float32)


def read_blocks(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """blocks: [...] → their KV as float32 [..., Hkv, BS, D]."""
    if cache.dtype not in LARGEST:
        return cache[blocks].float()
    values, scales = scaled_parts(cache)
    return values[blocks].float() * scales[blocks].unsqueeze(-1)


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] → values [..., D] of dtype and float32 scales [...]; see ops.WriteKV."""
    x = x.float()
    top = x.abs().amax(-1)
    inverse = torch.full_like(top, LARGEST[dtype]) / top  # not 127 / top: that is rounded twice
    inverse[inverse.isinf()] = 0  # nothing, or too small to divide by
    spoiled = ~x.isfinite().all(-1)
    scales = torch.where(inverse == 0, 0, top / LARGEST[dtype]).masked_fill(spoiled, float("nan"))
    values = (x * inverse.unsqueeze(-1)).masked_fill(spoiled.unsqueeze(-1), 0)
    return (values if dtype.is_floating_point else values.round()).to(dtype), scales


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    keep = slot_mapping >= 0
    if not keep.all():
        key, value, slot_mapping = key[keep], value[keep], slot_mapping[keep]
    block_size = key_cache.shape[2]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    for cache, new in ((key_cache, key), (value_cache, value)):
        if cache.dtype in LARGEST:
            values, scales = scaled_parts(cache)
            values[block, :, offset], scales[block, :, offset] = quantize(new, cache.dtype)
        else:
            cache[block, :, offset] = new.to(cache.dtype)


def copy_blocks(key_cache: torch.Tensor, value_cache: torch.Tensor, pairs: torch.Tensor) -> None:
    source, destination = pairs.unbind(dim=1)
    key_cache[destination] = key_cache[source]
    value_cache[destination] = value_cache[source]
