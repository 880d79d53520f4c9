"""KVSpec: what one attention layer keeps per token. Imports no torch, so that a pool can be planned without one."""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}
SCALED = ("int8", "float8_e4m3fn")  # come with a float32 scale per token and head
SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class KVSpec:
    """KV of one layer on this rank: key and value, each [num_kv_heads, head_size] per token.

    dtype: as stored; scales, where it has them, lie in the block too (ops.WriteKV).
    window: positions further back than this are never read again; None = all are.
    """

    num_kv_heads: int
    head_size: int
    dtype: str
    window: int | None = None

    @property
    def row_size(self) -> int:
        """Elements of `dtype` that a token's key, or value, of one head takes."""
        return self.head_size + (SCALE_BYTES if self.dtype in SCALED else 0)

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.row_size * DTYPE_BYTES[self.dtype]
