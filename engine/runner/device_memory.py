"""Where weights and KV go, the host's memory or a GPU's: what is checked before weights load, and how much KV gets.

HostMemory takes things as they come; GpuMemory measures (profile.py) and plans (memory.py). Put together here: config,
model and context become the facts that the plan is made of.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError
from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.decoder import CausalLM
from octavo.engine.layers.embedding import LMHead, VocabParallelEmbedding
from octavo.engine.layers.linear import Linear
from octavo.engine.layers.weight import Weight
from octavo.engine.quant.methods import ON_LOAD
from octavo.engine.runner.capability import FLOAT8
from octavo.engine.runner.memory import (
    Measured,
    ModelFacts,
    Need,
    check_free,
    plan_kv,
    quantized_saving,
    shortage,
    size,
)
from octavo.engine.runner.profile import Limits, look, measure

HOST_KV_BYTES = 4 << 30  # at the most, unless the config says otherwise


class DeviceMemory(Protocol):
    """Called in this order."""

    def check_weights(self, model: CausalLM, context: BuildContext, quantization: str) -> None:
        """Before they load. quantization: number format of linear layers, "none" for floats. Raises ConfigError."""

    def loading(self) -> AbstractContextManager[None]:
        """To load them in."""

    def for_kv(self, model: CausalLM, context: BuildContext) -> int:
        """Bytes. With the weights there. Raises ConfigError where too few are left."""

    @property
    def measured(self) -> Measured | None:
        """What `for_kv` planned with; None: it was not called, or had no need to measure."""


def memory_of(config: EngineConfig, device: torch.device, ranks_on_node: int) -> DeviceMemory:
    """Before anything is put on the device. ranks_on_node: of the replica, that share this machine's memory."""
    return GpuMemory(config, device) if device.type == "cuda" else HostMemory(ranks_on_node)


class HostMemory:
    measured = None

    def __init__(self, sharers: int) -> None:
        self._sharers = sharers

    def check_weights(self, model: CausalLM, context: BuildContext, quantization: str) -> None:
        """The system hands out what there is, and swaps."""

    @contextmanager
    def loading(self) -> Iterator[None]:
        yield

    def for_kv(self, model: CausalLM, context: BuildContext) -> int:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min(HOST_KV_BYTES, free // 4) // self._sharers


class GpuMemory:
    """Raises ConfigError if less is free than gpu_memory_utilization asks for, where that is what KV is sized by."""

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._before = look(device)
        self._facts: ModelFacts | None = None
        self.measured: Measured | None = None
        if config.sizes_kv_by_utilization:
            check_free(self._before.total, self._before.free, config.gpu_memory_utilization)

    def check_weights(self, model: CausalLM, context: BuildContext, quantization: str) -> None:
        float8 = torch.cuda.get_device_capability(self._device) >= FLOAT8
        self._facts = facts_of(model, context, quantization, float8)
        share = self._config.gpu_memory_utilization if self._config.sizes_kv_by_utilization else 1.0
        expected = Measured(self._before.total, self._before.free, self._facts.weights)
        if self._facts.weights > min(self._before.free, self._before.total * share):
            raise ConfigError(shortage(expected, share, need_of(self._config, model, context), self._facts.changes()))

    @contextmanager
    def loading(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            before, there = self._before, torch.cuda.memory_allocated(self._device)
            raise ConfigError(
                f"The weights have no room on the GPU: of {size(before.total)}, {size(before.total - before.free)} "
                f"were held by others and by the context, and {size(there - before.allocated)} were loaded when no "
                f"more could be: set quantization to int4, or cut the model over more GPUs (tensor_parallel_size)."
            ) from None

    def for_kv(self, model: CausalLM, context: BuildContext) -> int:
        assert self._facts is not None, "weights come first"
        limits = limits_of(self._config, model, context)
        self.measured = measured = measure(self._before, model, context.ops, limits, self._device)
        changes = self._facts.weighing(measured.weights).changes()
        share = self._config.gpu_memory_utilization
        return plan_kv(measured, share, need_of(self._config, model, context), changes)


def facts_of(model: CausalLM, context: BuildContext, quantization: str, float8: bool) -> ModelFacts:
    """Of a model whose weights have not come yet. Of weights that a checkpoint holds quantized, nothing is known."""
    floats = head = everything = 0
    is_tied = model.lm_head is not None and model.lm_head.method is None
    for layer in model.modules():
        is_head = isinstance(layer, VocabParallelEmbedding if is_tied else LMHead)
        for weight in (w for w in layer.parameters(recurse=False) if isinstance(w, Weight)):
            everything += weight.numel()
            head += weight.numel() if is_head else 0
            floats += weight.numel() if isinstance(layer, Linear) and weight.dim() == 2 else 0
    each = context.dtype.itemsize
    weights = everything * each
    if quantization in ON_LOAD:
        weights -= quantized_saving(quantization, floats, head, each)
    elif quantization != "none":
        weights = 0
    if quantization != "none":
        floats = head = 0
    spec = next(iter(model.kv_specs()), None)
    kv_dtype = context.kv_dtype or context.dtype
    return ModelFacts(
        kv_bytes=kv_dtype.itemsize,
        head_size=spec.head_size if spec else 1,
        num_kv_heads=spec.num_kv_heads if spec else 1,
        weights=weights,
        floats=floats,
        head=head,
        weight_bytes=each,
        float8=float8,
        tensor_parallel_size=context.mesh.tp.size,
    )


def need_of(config: EngineConfig, model: CausalLM, context: BuildContext) -> Need:
    token_bytes = sum(spec.bytes_per_token for spec in model.kv_specs())
    is_length = config.max_model_len is not None and token_bytes > 0
    tokens = context.num_positions if is_length else 2 * config.block_size
    return Need(tokens, token_bytes, config.block_size, is_length)


def limits_of(config: EngineConfig, model: CausalLM, context: BuildContext) -> Limits:
    pp, ops = context.mesh.pp, context.ops
    tokens = config.max_num_batched_tokens
    if not model.kv_specs():  # an encoder, whose prompts are computed whole
        tokens = max(tokens, context.num_positions)
    return Limits(
        max_num_batched_tokens=tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=context.num_positions,
        block_size=config.block_size,
        vocab_size=model.vocab_size,
        takes_logits=pp.is_last and model.lm_head is not None,
        hidden=None if pp.is_first else (model.width, context.dtype),
        records=ops.record is not None,
    )
