"""Writing and copying KV in the block pool. Shapes and contracts: `octavo.kernels.ops`."""

import torch

SCALE_BYTES = 4


def int8_parts(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An int8 cache [NB, Hkv, BS, D + 4] as values [NB, Hkv, BS, D] and float32 scales [NB, Hkv, BS]. Views."""
    num_blocks, num_heads, block_size, row = cache.shape
    head_size = row - SCALE_BYTES
    heads = cache.view(num_blocks, num_heads, block_size * row)
    values = heads[..., : block_size * head_size].unflatten(-1, (block_size, head_size))
    return values, heads[..., block_size * head_size :].view(torch.float32)


def read_blocks(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """blocks: [...] → their KV as float32 [..., Hkv, BS, D]."""
    if cache.dtype != torch.int8:
        return cache[blocks].float()
    values, scales = int8_parts(cache)
    return values[blocks] * scales[blocks].unsqueeze(-1)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] → int8 values [..., D] and float32 scales [...]; see ops.WriteKV."""
    x = x.float()
    top = x.abs().amax(-1)
    inverse = torch.full_like(top, 127) / top  # not 127 / top: that is rounded twice
    inverse[inverse.isinf()] = 0  # nothing, or too small to divide by
    spoiled = ~x.isfinite().all(-1)
    scales = torch.where(inverse == 0, 0, top / 127).masked_fill(spoiled, float("nan"))
    values = (x * inverse.unsqueeze(-1)).round().masked_fill(spoiled.unsqueeze(-1), 0)
    return values.to(torch.int8), scales


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
        if cache.dtype == torch.int8:
            values, scales = int8_parts(cache)
            values[block, :, offset], scales[block, :, offset] = quantize(new)
        else:
            cache[block, :, offset] = new.to(cache.dtype)


def copy_blocks(key_cache: torch.Tensor, value_cache: torch.Tensor, pairs: torch.Tensor) -> None:
    source, destination = pairs.unbind(dim=1)
    key_cache[destination] = key_cache[source]
    value_cache[destination] = value_cache[source]
