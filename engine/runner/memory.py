"""The memory plan of one GPU: how many bytes KV gets, and what to say where they are too few.

KV gets total * gpu_memory_utilization less what this process uses besides, as in vLLM. What others hold is not ours to
plan with: at the start, the utilization asked for must be free. Knows bytes, as they were measured (profile.py); knows
neither torch nor a GPU. All sizes are bytes on one rank's GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from octavo.engine.errors import ConfigError

MOST_UTILIZATION = 0.97  # that is suggested: drivers and libraries take some memory later
# Bytes of a weight and its scales: one for each output; float32 for every 64 weights; two of float16 for every 32.
QUANTIZED_BYTES = {"fp8": 1.01, "int8": 1.07, "int4": 0.63}
_LARGER_GROUPS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Measured:
    """total; free: at the start, before this process had more there than its context. weights: with all that the model
    keeps. activations: the most that a step takes at once, logits and draws included. buffers: tokens and tables of
    every slot. graphs: what recorded steps keep. libraries: outside of torch's allocator, such as code of kernels and
    buffers of NCCL, since the start."""

    total: int
    free: int
    weights: int
    activations: int = 0
    buffers: int = 0
    graphs: int = 0
    libraries: int = 0

    @property
    def used(self) -> int:
        """By this process, without KV."""
        return self.weights + self.activations + self.buffers + self.graphs + self.libraries

    def for_kv(self, utilization: float) -> int:
        """May be negative."""
        return int(self.total * utilization) - self.used

    def __str__(self) -> str:
        parts = [
            (self.weights, "weights"),
            (self.activations, "activations of a step"),
            (self.buffers, "tokens and block tables"),
            (self.graphs, "recorded steps"),
            (self.libraries, "libraries"),
        ]
        return ", ".join(f"{size(count)} {what}" for count, what in parts if count > 0)


@dataclass(frozen=True, slots=True)
class Need:
    """What KV must hold at least. tokens: a sequence of max_model_len if that is set (is_length), else two blocks.
    token_bytes: KV of a token."""

    tokens: int
    token_bytes: int
    block_size: int
    is_length: bool

    @property
    def bytes(self) -> int:
        return self.blocks * self.block_size * self.token_bytes

    @property
    def blocks(self) -> int:
        return -(-self.tokens // self.block_size)


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that may be changed, and what it makes of weights and of KV. kind: of several of one, the first that is
    enough is named."""

    kind: str
    setting: str
    weights: float = 1.0
    token_bytes: float = 1.0

    def and_also(self, other: Change) -> Change:
        kind, setting = f"{self.kind} and {other.kind}", f"{self.setting} and {other.setting}"
        return Change(kind, setting, self.weights * other.weights, self.token_bytes * other.token_bytes)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What can be changed about a model. kv_bytes: of an element of KV as it is stored, 1 = quantized already.
    num_kv_heads: on this rank. weights: bytes of all. floats, head: elements of linear layers, and of the head, of
    `weight_bytes` each, that may be quantized; 0 = none. float8: the GPU has it. tensor_parallel_size: as it is."""

    kv_bytes: int
    head_size: int
    num_kv_heads: int
    weights: int
    floats: int
    head: int
    weight_bytes: int
    float8: bool
    tensor_parallel_size: int

    def weighing(self, weights: int) -> ModelFacts:
        """With the weights as measured."""
        return replace(self, weights=weights)

    def changes(self) -> tuple[Change, ...]:
        """The mildest of each kind first."""
        found: list[Change] = []
        eight = "fp8" if self.float8 else "int8"
        if self.kv_bytes > 1:
            smaller = (self.head_size + 4) / (self.head_size * self.kv_bytes)
            found.append(Change("KV", f"kv_cache_dtype {eight}", token_bytes=smaller))
        if self.floats and self.weights:
            for name in (eight, "int4"):
                left = self.weights - quantized_saving(name, self.floats, self.head, self.weight_bytes)
                found.append(Change("weights", f"quantization {name}", weights=left / self.weights))
        heads = max(1, self.num_kv_heads)
        for times in _LARGER_GROUPS:
            setting = f"tensor_parallel_size {self.tensor_parallel_size * times}"
            found.append(Change("ranks", setting, 1.02 / times, math.ceil(heads / times) / heads))
        return tuple(found)


def quantized_saving(name: str, floats: int, head: int, weight_bytes: int) -> int:
    """Bytes that quantizing saves. name: int8, int4 or fp8. floats, head, weight_bytes: as ModelFacts has them."""
    each = QUANTIZED_BYTES[name]
    of_head = each if name != "int4" else QUANTIZED_BYTES["int8"]  # the head stays in 8 bits
    return int(floats * (weight_bytes - each) + head * (weight_bytes - of_head))


def check_free(total: int, free: int, utilization: float) -> None:
    """At the start. Raises ConfigError where others hold what was to be used."""
    wanted = int(total * utilization)
    if free >= wanted:
        return
    possible = math.floor(free / total * 100) / 100
    advice = f", or set gpu_memory_utilization to {possible:.2f}" if possible > 0 else ""
    raise ConfigError(
        f"gpu_memory_utilization {utilization:g} asks for {size(wanted)} of this GPU's {size(total)}, but only "
        f"{size(free)} are free: end the processes that hold the rest (nvidia-smi lists them){advice}."
    )


def plan_kv(measured: Measured, utilization: float, need: Need, changes: Sequence[Change]) -> int:
    """Bytes for KV. Raises ConfigError where they are not enough for `need`."""
    memory = measured.for_kv(utilization)
    if memory < need.bytes:
        raise ConfigError(shortage(measured, utilization, need, changes))
    return memory


def shortage(measured: Measured, utilization: float, need: Need, changes: Sequence[Change]) -> str:
    """Why `need` does not fit, in numbers, and which settings would make it fit."""
    left = measured.for_kv(utilization)
    what = f"max_model_len {need.tokens}" if need.is_length else f"two blocks of {need.block_size} tokens"
    leaves = f"that leaves {size(left)} for KV" if left > 0 else f"that is {size(-left)} too much, before any KV"
    ways = list(ways_out(measured, utilization, need, changes))
    advice = "what would fit: " + "; or ".join(ways) if ways else "use a larger GPU or a smaller model"
    ours, taken = int(measured.total * utilization), measured.total - measured.free
    return (
        f"The model does not fit on the GPU: of {size(measured.total)}, of which {size(taken)} were in use at the "
        f"start, gpu_memory_utilization {utilization:g} is {size(ours)}, and this process needs {size(measured.used)} "
        f"({measured}); {leaves}, of which {what} would take {size(need.bytes)}: {advice}."
    )


def ways_out(measured: Measured, utilization: float, need: Need, changes: Sequence[Change]) -> Iterator[str]:
    """Settings with which `need` is met, by this plan; two together only if none is enough by itself."""
    left = measured.for_kv(utilization)
    length = max(0, left) // (need.block_size * need.token_bytes) * need.block_size
    if need.is_length and length >= 2 * need.block_size:
        yield f"max_model_len {length}"
    wanted = math.ceil((measured.used + need.bytes) / measured.total * 100) / 100
    if wanted <= min(MOST_UTILIZATION, measured.free / measured.total):
        yield f"gpu_memory_utilization {wanted:.2f}"
    if measured.graphs and left + measured.graphs >= need.bytes:
        yield "enforce_eager"
    singles = _enough(measured, utilization, need, changes)
    pairs = (a.and_also(b) for a, b in itertools.combinations(changes, 2) if a.kind != b.kind)
    yield from singles or _enough(measured, utilization, need, tuple(pairs))


def _enough(measured: Measured, utilization: float, need: Need, changes: Sequence[Change]) -> list[str]:
    """The first of each kind that is."""
    found: dict[str, str] = {}
    for change in changes:
        saved = measured.weights - math.ceil(measured.weights * change.weights)
        if measured.for_kv(utilization) + saved >= math.ceil(need.bytes * change.token_bytes):
            found.setdefault(change.kind, change.setting)
    return list(found.values())


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
