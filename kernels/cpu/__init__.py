"""Native CPU bodies of the ops for float32 and bfloat16 tensors. Contracts: `octavo.kernels.ops`.

Knows tensors, their strides and the C ABI (abi.h). Does not know threads: it passes torch's count on, per call.
`load` chooses the library; without one (no compiler at install time) there is no body and `ref` is used.

Layout asked for: caches with contiguous blocks; the last dimension of everything else contiguous.
query, key, value and x may be slices of a fused projection. What does not fit is copied first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, get_num_threads

from octavo.kernels.cpu.graph import Arena, Graph, Recorder
from octavo.kernels.cpu.library import ISAS, Op, open_library, runnable
from octavo.kernels.cpu.pack import PackedLinear, pack
from octavo.kernels.cpu.row_attention import row_attention
from octavo.kernels.matrix import Matrix, alike
from octavo.kernels.ops import AttentionBatch
from octavo.kernels.ref import penalties
from octavo.kernels.rounded import Rounding
from octavo.kernels.sampling import BLOCK, Draws, Logprobs, Masks, Peaks

__all__ = ["Body", "load"]

# Of graphs' tensors. Address space: memory is used where it is written, some megabytes for a decode step.
ARENA_BYTES = 1 << 30

# dtype → the C ABI's flag. Another dtype is a KeyError: better than reading its bytes as float32.
BF16 = {torch.float32: 0, torch.bfloat16: 1}
CACHE = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class Body:
    """The ops, bound to one compiled library. `isa` names its instruction set.

    One per engine: while `record` runs, what is called is noted, whoever calls.
    """

    batch_invariant = True

    def __init__(self, isa: str, library: ctypes.CDLL, functions: Mapping[str, Op]) -> None:
        self.isa = isa
        self._library, self._ops = library, functions
        self._recorder: Recorder | None = None
        self._arena: Arena | None = None

    def _call(self, name: str, *arguments: float) -> None:
        op = self._ops[name]
        packed = op.pack(*arguments)
        if self._recorder is not None:
            self._recorder.add(op, packed)
        op.call(packed)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype) if self._recorder is None else self._recorder.arena.empty(shape, dtype)

    def record(self, forward: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        if self._arena is None:
            self._arena = Arena(ARENA_BYTES)
        self._arena.reset()
        with Recorder(self._arena) as recorder:
            self._recorder = recorder
            try:
                outputs = forward()
            finally:
                self._recorder = None
        return Graph(self._library, recorder.calls, outputs), outputs

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
        out = self._empty((num_tokens, num_heads, head_size), query.dtype)
        self._call(
            "paged_attention",
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
            CACHE[key_cache.dtype],
            get_num_threads(),
        )
        return out

    @staticmethod
    def row_attention(query: Tensor, key: Tensor, value: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
        """By torch: rows are computed once per prompt, several hundred tokens at most, which its kernel is good at."""
        return row_attention(query, key, value, batch.query_start.tolist(), scale)

    def write_kv(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        key_stride, key_head_stride, last = key.stride()
        value_stride, value_head_stride, value_last = value.stride()
        if last != 1 or value_last != 1:
            return self.write_kv(key.contiguous(), value.contiguous(), key_cache, value_cache, slot_mapping)
        num_tokens, num_kv_heads, head_size = key.shape
        self._call(
            "write_kv",
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
            CACHE[key_cache.dtype],
            get_num_threads(),
        )
        return None

    def copy_blocks(self, key_cache: Tensor, value_cache: Tensor, pairs: Tensor) -> None:
        pairs = pairs.contiguous()
        size = key_cache.element_size()
        self._call(
            "copy_blocks",
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            pairs.data_ptr(),
            pairs.shape[0],
            key_cache[0].numel() * size,
            key_cache.stride(0) * size,
            value_cache.stride(0) * size,
            get_num_threads(),
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, rounding: None = None) -> Tensor:
        """Nothing is rounded here, see `rounding_of`."""
        width = x.shape[-1]
        if x.is_contiguous():
            outer, inner, outer_stride, inner_stride = x.numel() // width, 1, width, 0
        elif x.dim() == 3 and x.stride(2) == 1:
            (outer, inner, _), (outer_stride, inner_stride, _) = x.shape, x.stride()
        elif x.dim() == 2 and x.stride(1) == 1:
            outer, inner, outer_stride, inner_stride = x.shape[0], 1, x.stride(0), 0
        else:
            return self.rms_norm(x.contiguous(), weight, eps)
        out = self._empty(x.shape, x.dtype)
        self._call(
            "rms_norm",
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

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: None = None
    ) -> tuple[Tensor, Tensor]:
        """Overwrites both: x becomes the norm, residual the sum."""
        if not (x.is_contiguous() and residual.is_contiguous() and x.dtype == residual.dtype):
            total = (x + residual).contiguous()
            return self.rms_norm(total, weight, eps), total
        width = x.shape[-1]
        self._call(
            "add_rms_norm",
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
        self._call(
            "rotary",
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

    def silu_and_mul(self, x: Tensor, rounding: None = None) -> Tensor:
        return self._gated("silu_and_mul", x)

    def gelu_tanh_and_mul(self, x: Tensor, rounding: None = None) -> Tensor:
        return self._gated("gelu_tanh_and_mul", x)

    def gelu_tanh(self, x: Tensor) -> Tensor:
        if x.stride(1) != 1:
            x = x.contiguous()
        rows, width = x.shape
        out = self._empty((rows, width), x.dtype)
        arguments = out.data_ptr(), x.data_ptr(), rows, x.stride(0), width, BF16[x.dtype], get_num_threads()
        self._call("gelu_tanh", *arguments)
        return out

    def _gated(self, name: str, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.stride(1) != 1:
            x = x.contiguous()
        width = x.shape[-1] // 2
        rows = x.numel() // (2 * width)
        stride = x.stride(0) if x.dim() == 2 else 2 * width
        out = self._empty((*x.shape[:-1], width), x.dtype)
        self._call(name, out.data_ptr(), x.data_ptr(), rows, stride, width, BF16[x.dtype], get_num_threads())
        return out

    @staticmethod
    def pack_linear(matrices: Sequence[Matrix]) -> PackedLinear:
        return PackedLinear(tuple(pack(neighbours) for neighbours in alike(matrices)))

    @staticmethod
    def rounding_of(weight: PackedLinear, dtype: torch.dtype) -> Rounding | None:
        """`linear` lays x out as it rounds it."""
        return None

    def linear(self, x: Tensor, weight: PackedLinear, bias: Tensor | None = None) -> Tensor:
        if x.stride(1) != 1:
            x = x.contiguous()
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        outputs, size = weight.outputs, x.element_size()
        out = self._empty((x.shape[0], outputs), x.dtype)
        first = 0
        for section in weight.sections:
            ordered = x if section.order is None else x[:, section.order]
            self._call(
                "linear",
                out.data_ptr() + first * size,
                ordered.data_ptr(),
                section.data.data_ptr(),
                0 if bias is None else bias.data_ptr() + first * size,
                x.shape[0],
                section.inputs,
                section.outputs,
                ordered.stride(0),
                outputs,
                BF16[x.dtype],
                *section.layout,
                get_num_threads(),
            )
            first += section.outputs
        return out

    def embedding(self, ids: Tensor, weight: PackedLinear, dtype: torch.dtype) -> Tensor:
        (section,) = weight.sections
        out = self._empty((ids.shape[0], weight.inputs), dtype)
        self._call(
            "embedding",
            out.data_ptr(),
            ids.data_ptr(),
            ids.shape[0],
            0,
            0,
            section.data.data_ptr(),
            0,
            0,
            section.inputs,
            section.outputs,
            0,
            0,
            BF16[dtype],
            *section.layout,
            get_num_threads(),
        )
        return out

    # Some hundred tokens of a few rows: torch is good enough.
    apply_penalties = staticmethod(penalties.apply_penalties)
    count_tokens = staticmethod(penalties.count_tokens)

    def mask_logits(self, logits: Tensor, masks: Masks) -> None:
        rows, words = masks.bits.shape
        self._call(
            "mask_logits",
            _float32(logits),
            masks.rows.ctypes.data,
            masks.bits.data_ptr(),
            rows,
            logits.shape[1],
            words,
            get_num_threads(),
        )

    def find_peaks(self, logits: Tensor) -> Peaks:
        rows, vocab = logits.shape
        maxima = self._empty((rows, -(-vocab // BLOCK)), torch.float32)
        top = self._empty((rows,), torch.float32)
        token_ids = self._empty((rows,), torch.int64)
        self._call(
            "find_peaks",
            _float32(logits),
            maxima.data_ptr(),
            top.data_ptr(),
            token_ids.data_ptr(),
            rows,
            vocab,
            get_num_threads(),
        )
        return Peaks(maxima, top, token_ids)

    def draw(self, logits: Tensor, peaks: Peaks, draws: Draws) -> Tensor:
        token_ids = self._empty((len(draws.rows),), torch.int64)
        self._call(
            "draw",
            _float32(logits),
            peaks.maxima.data_ptr(),
            peaks.top.data_ptr(),
            draws.rows.ctypes.data,
            draws.top_k.ctypes.data,
            draws.temperature.ctypes.data,
            draws.top_p.ctypes.data,
            draws.min_p.ctypes.data,
            draws.uniforms.ctypes.data,
            token_ids.data_ptr(),
            len(draws.rows),
            logits.shape[1],
            get_num_threads(),
        )
        return token_ids

    def take_logprobs(self, logits: Tensor, token_ids: Tensor, k: int) -> Logprobs:
        rows, vocab = logits.shape
        token_ids = token_ids.contiguous()
        own, ranks = self._empty((rows,), torch.float32), self._empty((rows,), torch.int64)
        ids, values = self._empty((rows, k), torch.int64), self._empty((rows, k), torch.float32)
        self._call(
            "take_logprobs",
            _float32(logits),
            token_ids.data_ptr(),
            own.data_ptr(),
            ranks.data_ptr(),
            ids.data_ptr(),
            values.data_ptr(),
            rows,
            vocab,
            k,
            get_num_threads(),
        )
        return Logprobs(token_ids, own, ranks, ids, values)


def _float32(logits: Tensor) -> int:
    """The address of logits as the sampling ops ask for them."""
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"Logits must be contiguous float32, got {logits.dtype} with strides {logits.stride()}.")
    return logits.data_ptr()


def load(isa: str | None = None) -> Body | None:
    """A body for `isa` (see ISAS), or for the best this CPU runs. None: no library was built.

    Raises ValueError if `isa` is named and unknown, or known but cannot run here.
    """
    if isa is not None and isa not in ISAS:
        raise ValueError(f"Unknown CPU instruction set {isa!r}: choose one of {', '.join(ISAS)}.")
    for name, path in runnable().items():
        if isa is None or name == isa:
            return Body(name, *open_library(path))
    if isa is not None:
        raise ValueError(f"The CPU kernels for {isa} cannot run here: the library is not built or the CPU lacks it.")
    return None
