"""Native CPU bodies of the ops for float32 and bfloat16 tensors. Contracts: `octavo.kernels.ops`.

Knows tensors, their strides and the C ABI (abi.h). Does not know threads: it passes torch's count on, per call.
`load` chooses the library once; without one (no compiler at install time) nothing is `available` and `ref` is used.

Layout asked for: caches [NB, Hkv, BS, D] with contiguous blocks; the last dimension of everything else contiguous.
query, key, value and x may be slices of a fused projection. What does not fit is copied first.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor, get_num_threads

from octavo.kernels.cpu.library import ISAS, open_library, runnable
from octavo.kernels.ops import AttentionBatch

__all__ = ["Body", "available", "load"]

# dtype → the C ABI's flag. Another dtype is a KeyError: better than reading its bytes as float32.
BF16 = {torch.float32: 0, torch.bfloat16: 1}


class Body:
    """The ops, bound to one compiled library. `isa` names its instruction set."""

    def __init__(self, isa: str, library: ctypes.CDLL) -> None:
        self.isa = isa
        self._paged_attention = library.octavo_paged_attention
        self._write_kv = library.octavo_write_kv
        self._copy_blocks = library.octavo_copy_blocks
        self._rms_norm = library.octavo_rms_norm
        self._add_rms_norm = library.octavo_add_rms_norm
        self._rotary = library.octavo_rotary
        self._silu_and_mul = library.octavo_silu_and_mul
        self._gelu_tanh_and_mul = library.octavo_gelu_tanh_and_mul

    @staticmethod
    def available(device: torch.device, dtype: torch.dtype) -> bool:
        return device.type == "cpu" and dtype in BF16

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> Tensor:
        token_stride, head_stride, last = query.stride()
        if last != 1:
            query = query.contiguous()
            token_stride, head_stride, _ = query.stride()
        num_tokens, num_heads, head_size = query.shape
        _, num_kv_heads, block_size, _ = key_cache.shape
        tables = batch.block_tables
        out = torch.empty((num_tokens, num_heads, head_size), dtype=query.dtype)
        self._paged_attention(
            out.data_ptr(),
            query.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            tables.data_ptr(),
            batch.query_start.data_ptr(),
            batch.context_lens.data_ptr(),
            token_stride,
            head_stride,
            key_cache.stride(0),
            value_cache.stride(0),
            tables.stride(0),
            tables.shape[0],
            num_heads,
            num_kv_heads,
            head_size,
            block_size,
            scale,
            window or 0,
            soft_cap or 0.0,
            BF16[query.dtype],
            BF16[key_cache.dtype],
            get_num_threads(),
        )
        return out

    def write_kv(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        key_stride, key_head_stride, last = key.stride()
        value_stride, value_head_stride, value_last = value.stride()
        if last != 1 or value_last != 1:
            return self.write_kv(key.contiguous(), value.contiguous(), key_cache, value_cache, slot_mapping)
        num_tokens, num_kv_heads, head_size = key.shape
        self._write_kv(
            key.data_ptr(),
            value.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            slot_mapping.data_ptr(),
            num_tokens,
            num_kv_heads,
            head_size,
            key_cache.shape[2],
            key_stride,
            key_head_stride,
            value_stride,
            value_head_stride,
            key_cache.stride(0),
            value_cache.stride(0),
            BF16[key.dtype],
            BF16[key_cache.dtype],
            get_num_threads(),
        )
        return None

    def copy_blocks(self, key_cache: Tensor, value_cache: Tensor, pairs: Tensor) -> None:
        pairs = pairs.contiguous()
        size = key_cache.element_size()
        self._copy_blocks(
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            pairs.data_ptr(),
            pairs.shape[0],
            key_cache[0].numel() * size,
            key_cache.stride(0) * size,
            value_cache.stride(0) * size,
            get_num_threads(),
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        if x.is_contiguous():
            outer, inner, outer_stride, inner_stride = x.numel() // width, 1, width, 0
        elif x.dim() == 3 and x.stride(2) == 1:
            (outer, inner, _), (outer_stride, inner_stride, _) = x.shape, x.stride()
        elif x.dim() == 2 and x.stride(1) == 1:
            outer, inner, outer_stride, inner_stride = x.shape[0], 1, x.stride(0), 0
        else:
            return self.rms_norm(x.contiguous(), weight, eps)
        out = torch.empty(x.shape, dtype=x.dtype)
        self._rms_norm(
            out.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            outer,
            inner,
            outer_stride,
            inner_stride,
            width,
            eps,
            BF16[x.dtype],
            BF16[weight.dtype],
            get_num_threads(),
        )
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Overwrites both: x becomes the norm, residual the sum."""
        if not (x.is_contiguous() and residual.is_contiguous() and x.dtype == residual.dtype):
            total = (x + residual).contiguous()
            return self.rms_norm(total, weight, eps), total
        width = x.shape[-1]
        self._add_rms_norm(
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            x.numel() // width,
            width,
            width,
            width,
            eps,
            BF16[x.dtype],
            BF16[weight.dtype],
            get_num_threads(),
        )
        return x, residual

    def rotary(self, query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
        """In place."""
        query_stride, query_head_stride, last = query.stride()
        key_stride, key_head_stride, key_last = key.stride()
        if last != 1 or key_last != 1:
            return self.rotary(query.contiguous(), key.contiguous(), positions, cos_sin)
        self._rotary(
            query.data_ptr(),
            key.data_ptr(),
            positions.data_ptr(),
            cos_sin.data_ptr(),
            positions.shape[0],
            query.shape[1],
            key.shape[1],
            query_stride,
            query_head_stride,
            key_stride,
            key_head_stride,
            cos_sin.shape[1],
            BF16[query.dtype],
            get_num_threads(),
        )
        return query, key

    def silu_and_mul(self, x: Tensor) -> Tensor:
        return self._gated(self._silu_and_mul, x)

    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor:
        return self._gated(self._gelu_tanh_and_mul, x)

    def _gated(self, function: ctypes._NamedFuncPointer, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.stride(1) != 1:
            x = x.contiguous()
        width = x.shape[-1] // 2
        rows = x.numel() // (2 * width)
        stride = x.stride(0) if x.dim() == 2 else 2 * width
        out = torch.empty((*x.shape[:-1], width), dtype=x.dtype)
        function(out.data_ptr(), x.data_ptr(), rows, stride, width, BF16[x.dtype], get_num_threads())
        return out


@lru_cache
def load(isa: str | None = None) -> Body | None:
    """The body for `isa` ("avx512", "avx2", "base"), or for the best this CPU runs. None: no library was built.

    Raises ValueError if `isa` is named and unknown, or known but cannot run here.
    """
    if isa is not None and isa not in ISAS:
        raise ValueError(f"Unknown CPU instruction set {isa!r}: choose one of {', '.join(ISAS)}.")
    for name, path in runnable().items():
        if isa is None or name == isa:
            return Body(name, open_library(path))
    if isa is not None:
        raise ValueError(f"The CPU kernels for {isa} cannot run here: the library is not built or the CPU lacks it.")
    return None


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the best library of this machine can take such tensors."""
    return Body.available(device, dtype) and load() is not None


def __getattr__(name: str) -> object:
    """The ops of the best library, so that the module itself is a body."""
    body = None if name.startswith("_") else load()
    if body is None or not hasattr(body, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(body, name)
