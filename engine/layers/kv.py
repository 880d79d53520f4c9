"""KVSpec: what one attention layer keeps per token. Imports no torch, so that a pool can be planned without one."""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KVSpec:
    """KV of one layer on this rank: key and value, each [num_kv_heads, head_size] per token.

    window: positions further back than this are never read again; None = all are.
    """

    num_kv_heads: int
    head_size: int
    dtype: str
    window: int | None = None

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.head_size * DTYPE_BYTES[self.dtype]
