"""The ops: signatures, shapes and contracts, and the choice of a body for each.

Knows tensors and ints. Does not know sequences, configs, models or ranks. `ref/` is the definition of every op; another
body must match it within the tolerance stated in tests/kernels. The choice is made once, when an engine is built, by
`select`.

Shapes: T tokens of the step (packed), S sequences, NB blocks in the pool, BS slots per block, MB block table width,
Hq / Hkv heads, D head size, M model width, F FFN width, R rows that are sampled, V vocab.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch

from octavo.kernels.matrix import Matrix
from octavo.kernels.rounded import Rounded, Rounding
from octavo.kernels.sampling import Draws, Ints, Logprobs, Masks, Peaks, Penalised, Tallies

log = logging.getLogger(__name__)


Packed = Any  # a weight as a body keeps it: its own affair, but for `nbytes`


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where each sequence's tokens and KV are in this step. Made once per step, read by every layer.

    block_tables: [S, MB] int32, unused entries 0.
    query_start:  [S + 1] int32, first token of each sequence in the packed T; query_start[S] = T.
    context_lens: [S] int32, KV length of each sequence including this step's tokens; the sequence's queries are the
                  last query_start[s+1] - query_start[s] positions of it. Never 0.
    slot_mapping: [T] int64, block * BS + offset where the token's KV goes, -1 = do not write.
    max_query_len, max_context_len: maxima over the step.
    """

    block_tables: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    slot_mapping: torch.Tensor
    max_query_len: int
    max_context_len: int


class WriteKV(Protocol):
    def __call__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store key, value [T, Hkv, D] into the caches at slot_mapping [T]; -1 skips. In place.

        caches: [NB, Hkv, BS, D] of float32, bfloat16 or float16, or [NB, Hkv, BS, D + 4] of int8 or float8_e4m3fn: of
        each block and head first BS rows of D values, then BS float32 scales, one per row: what is stored is value *
        scale. The scale is the largest magnitude of the row / 127, or / 448; values are rounded to the nearest, ties to
        even. A row with an infinity or NaN gets the scale NaN. (float8_e4m3fn: not by the native CPU body.)
        """


class PagedAttention(Protocol):
    def __call__(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """Causal attention of the step's queries over the KV in their blocks.

        query: [T, Hq, D]; caches: as WriteKV says, this step's KV already written. Returns [T, Hq, D], dtype of query.
        Query head h reads KV head h // (Hq // Hkv). `window` w: position p sees (p - w, p], that is w positions
        with itself. `soft_cap` c: scores become c * tanh(score / c), after scaling, before the mask. Everything is
        computed in float32, whatever the caches' type.

        The native CPU body gives a query the same bits whatever else is in the step: alone or in a chunk of any size,
        with any other sequences, blocks and number of threads.
        """


class RowAttention(Protocol):
    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: AttentionBatch, scale: float
    ) -> torch.Tensor:
        """Attention of every token over all tokens of its own row, before it and behind it: an encoder's.

        query: [T, Hq, D]; key, value: [T, Hkv, D]; of the batch, query_start alone is read. Returns [T, Hq, D], dtype
        of query. Query head h reads KV head h // (Hq // Hkv). A row's result does not depend on the other rows.
        """


class CopyBlocks(Protocol):
    def __call__(self, key_cache: torch.Tensor, value_cache: torch.Tensor, pairs: torch.Tensor) -> None:
        """Copy whole blocks. pairs: [N, 2] int64 (source, destination); no block is both. In place."""


class RMSNorm(Protocol):
    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, rounding: Rounding | None = None
    ) -> torch.Tensor | Rounded:
        """x [..., M] / rms(x) * weight [M], computed in float32, returned in x's dtype. weight may be float32.

        rounding: what the weight that multiplies with the result asks for (`RoundingOf`); x is [T, M], the result
        Rounded: from the result in x's dtype, to the bit.
        """


class AddRMSNorm(Protocol):
    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        rounding: Rounding | None = None,
    ) -> tuple[torch.Tensor | Rounded, torch.Tensor]:
        """(rms_norm(x + residual), x + residual). May overwrite both inputs. rounding: of the first, as RMSNorm's."""


class Rotary(Protocol):
    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate the first R of D components of query [T, Hq, D] and key [T, Hkv, D], half-split ("NeoX") pairing:
        component i pairs with i + R/2. positions: [T] int64. cos_sin: [P, R] float32, cos in the first R/2 columns,
        sin in the last. Computed in float32. May work in place; use the result."""


class GatedActivation(Protocol):
    def __call__(self, x: torch.Tensor, rounding: Rounding | None = None) -> torch.Tensor | Rounded:
        """x: [T, 2F] = (gate, up) → act(gate) * up: [T, F]. rounding: as RMSNorm's."""


class Activation(Protocol):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, F] → [T, F]. Torch's own would do, but the last few of a tensor's elements get other bits from it."""


class PackLinear(Protocol):
    def __call__(self, matrices: Sequence[Matrix]) -> Packed:
        """A copy of a weight, the outputs of all matrices one after the other, in the layout that `linear` and
        `embedding` of the same body read. The matrices agree in their inputs and may differ in all else; neighbours of
        the same `form` become a single product."""


class RoundingOf(Protocol):
    def __call__(self, weight: Packed, dtype: torch.dtype) -> Rounding | None:
        """What `linear` of the same body rounds x of that dtype to before it multiplies with the weight, so that the op
        before it may do so. None: nothing, or no single thing, or it would rather do that itself."""


class Linear(Protocol):
    def __call__(self, x: torch.Tensor | Rounded, weight: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, K] @ weight [N, K]ᵀ + bias [N] → [T, N] in x's dtype, float32 or bfloat16 whatever the weight's.

        Sums in float32. Weights of codes: x is rounded to 8 bits, symmetrically, one scale per row and group of the
        weight, as every engine of this field does on a CPU: q = round(x * 127 / max|x|), products of a group summed
        exactly. A row that is not finite gives a row that is not finite.

        The body for GPUs rounds x as its engines do: with float8 weights to float8, with int8 weights as above, with
        other codes not at all. An x that comes Rounded, as `rounding_of` the weight says, gives the same bits as if it
        had been rounded here.
        """


class Embedding(Protocol):
    def __call__(self, ids: torch.Tensor, weight: Packed, dtype: torch.dtype) -> torch.Tensor:
        """Outputs ids [T] int64 of a weight [N, K] of a single matrix, as numbers: [T, K] in dtype."""


class MaskLogits(Protocol):
    def __call__(self, logits: torch.Tensor, masks: Masks) -> None:
        """-inf for every token of the masks' rows whose bit is 0. logits: [R, V] float32 contiguous. In place."""


class ApplyPenalties(Protocol):
    def __call__(self, logits: torch.Tensor, tallies: Tallies, penalised: Penalised) -> None:
        """Penalise logits [R, V] float32 contiguous, in place, at the rows and known tokens of `penalised`.

        As in vLLM: repetition first (positive logits divided, others multiplied), then frequency times the count, then
        presence where the count is not 0. On a device without a wait for it.
        """


class CountTokens(Protocol):
    def __call__(self, tallies: Tallies, places: Ints, rows: Ints, token_ids: torch.Tensor) -> None:
        """Add token_ids[rows] to the tallies at `places`; host arrays [N], each place once. token_ids: [R] int64.

        In place; on a device without a wait for it.
        """


class FindPeaks(Protocol):
    def __call__(self, logits: torch.Tensor) -> Peaks:
        """The largest of logits [R, V] float32 contiguous, per row and per block."""


class Draw(Protocol):
    def __call__(self, logits: torch.Tensor, peaks: Peaks, draws: Draws) -> torch.Tensor:
        """[N] int64: a token for each row of `draws`, from logits [R, V] float32 contiguous, whose `peaks` these are.

        The probability of a token is proportional to exp(logit / temperature) among the kept ones. Kept is what min_p,
        top_k and top_p all keep: a probability of at least min_p times the largest; the top_k most likely; of what
        these two leave, the fewest most likely ones that together have top_p of it. Tokens that tie at an edge are all
        kept. The token is the one at `uniform` of the CDF in token order. A row's token depends on its own logits and
        numbers alone, bit for bit. 0 where a row's top is not finite. On a device without a wait for it.
        """


class DrawRows(Protocol):
    def __call__(self, logits: torch.Tensor, peaks: Peaks, numbers: torch.Tensor, filtered: bool) -> torch.Tensor:
        """As `Draw`, of numbers [6, N] float64 that are on the device already (see `Draws.numbers`): a graph reads them
        anew in every replay. filtered: see `Draws.filtered`; True is always right, False saves time."""


class TakeLogprobs(Protocol):
    def __call__(self, logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> Logprobs:
        """Log-softmax of logits [N, V] float32 contiguous at token_ids [N] int64 and at the k most likely tokens,
        k <= V.

        A token's rank is one plus the number of strictly greater logits. Among equal logits at the edge of the k, any
        may be among them. Log probabilities that would be NaN (a broken model's) become -inf.
        """


class NotRecordable(Exception):
    """A forward computes something that a replay would leave out."""


class Graph(Protocol):
    """A forward that was recorded."""

    def replay(self) -> torch.Tensor:
        """Do it again with what the inputs hold now. Returns what the recorded function returned, overwritten."""


class Record(Protocol):
    def __call__(self, forward: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
        """Call `forward` and note the ops it calls, with the memory they read and write; its result comes along.

        Between ops it may make views and nothing else. Memory is shared by all graphs: a recording or replay overwrites
        what the last one returned. Raises NotRecordable.
        """


@dataclass(frozen=True, slots=True)
class Ops:
    """One body per op, chosen by `select`; handed to layers when a model is built."""

    write_kv: WriteKV
    paged_attention: PagedAttention
    row_attention: RowAttention
    copy_blocks: CopyBlocks
    rms_norm: RMSNorm
    add_rms_norm: AddRMSNorm
    rotary: Rotary
    silu_and_mul: GatedActivation
    gelu_tanh_and_mul: GatedActivation
    gelu_tanh: Activation
    pack_linear: PackLinear
    rounding_of: RoundingOf
    linear: Linear
    embedding: Embedding
    mask_logits: MaskLogits
    apply_penalties: ApplyPenalties
    count_tokens: CountTokens
    find_peaks: FindPeaks
    draw: Draw
    take_logprobs: TakeLogprobs
    batch_invariant: bool = False  # every op's bits for a row are independent of the other rows
    draw_rows: DrawRows | None = None  # of the body that `draw` is from; None: it has none
    record: Record | None = None  # of the body that `linear` is from; None: it cannot
    bodies: tuple[tuple[str, str], ...] = ()  # (op, body) as chosen, for the start-up table


# A body has functions of the ops' names; it may leave ops out. `available()` says whether it can run here.
BODIES: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "ref"),
    "cuda": ("triton", "ref"),
}


def select(device: torch.device, dtype: torch.dtype, force: str | None = None, cpu_isa: str | None = None) -> Ops:
    """Choose a body for every op. `force` names one ("ref", "cpu", "triton"): it is tried first, `ref` fills its gaps.

    cpu_isa: the instruction set of the native CPU ops; None = the best here. Raises ValueError if it cannot run here.
    """
    names = BODIES.get(device.type, ("ref",)) if force is None else (force, "ref")
    bodies = [(name, body) for name in dict.fromkeys(names) if (body := _body(name, cpu_isa)) is not None]
    chosen: dict[str, Callable[..., object]] = {}
    took: list[tuple[str, str]] = []
    for op in (f.name for f in fields(Ops) if f.name not in ("batch_invariant", "draw_rows", "record", "bodies")):
        for name, body in bodies:
            if body.available(device, dtype) and hasattr(body, op):
                chosen[op] = getattr(body, op)
                took.append((op, name))
                break
    log.debug("kernel bodies: %s", took)
    used = [body for name, body in bodies if name in dict(took).values()]
    draw_rows = getattr(dict(bodies)[dict(took)["draw"]], "draw_rows", None)
    record = getattr(dict(bodies)[dict(took)["linear"]], "record", None)
    invariant = all(getattr(body, "batch_invariant", False) for body in used)
    return Ops(**chosen, batch_invariant=invariant, draw_rows=draw_rows, record=record, bodies=tuple(took))  # type: ignore[arg-type]


def _body(name: str, cpu_isa: str | None) -> Any:
    """None: there is nothing of it on this machine."""
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return None
    module: Any = importlib.import_module(f"octavo.kernels.{name}")
    return module.load(cpu_isa) if name == "cpu" else module
