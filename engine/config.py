"""EngineConfig: what a user may set about one engine. Frozen; resolved once by `octavo.engine.build`.

Names and defaults follow vLLM's engine arguments where the meaning is the same. Facts that are measured (the number of
KV blocks) or read from the checkpoint (the context length) are not here: `build` returns them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from octavo.engine.errors import ConfigError
from octavo.engine.pooling.config import PoolerConfig, parse_pooler_config

DType = Literal["auto", "float32", "bfloat16", "float16"]
KVDType = Literal["auto", "float32", "bfloat16", "int8", "fp8", "fp8_e4m3"]
Policy = Literal["fcfs", "priority"]
Quantization = Literal["auto", "none", "int8", "int4", "fp8", "gguf", "gptq", "awq", "compressed-tensors"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One replica's engine.

    model: local Hugging Face folder, `.gguf` file, hub id, or the name of a preset in configs/models/. `fake` = none at
        all, for trying out what is around a model; `fake:step_ms=20,token_us=50` says how slow it is.
    tokenizer: a source of the same kinds for the tokenizer alone; None = the model's.
    max_model_len: longest prompt + output in tokens; None = the model's own limit, lowered to what the KV pool holds.
    num_gpu_blocks_override: exact number of KV blocks (on CPU too; the name is vLLM's).
    kv_cache_memory_bytes: KV pool size; None = on GPU from gpu_memory_utilization, on CPU 4 GiB or, if less, a quarter
        of the free memory.
    kv_cache_dtype: what KV is stored in; auto = the model's dtype. int8 and fp8 (float8 e4m3, also called fp8_e4m3; not
        for the native CPU kernels, on GPUs from compute capability 8.9) have a float32 scale per token and head.
    tensor_parallel_size, pipeline_parallel_size: ranks that share each layer, stages the layers are dealt to; a replica
        has one process per rank, their product.
    max_num_batched_tokens: the token budget of a step. max_num_seqs: the most rows of a step.
    max_num_queued_reqs: waiting requests beyond which new ones get CapacityError; None = no limit.
    long_prefill_token_threshold: the most prompt tokens one sequence may compute in a step; 0 = only the token budget.
    enable_chunked_prefill false: a prompt is computed in one step or waits.
    async_scheduling: plan step N+1 while N runs.
    enforce_eager: run every step op by op, without recorded graphs.
    disable_custom_all_reduce: GPUs add up with NCCL alone, also where they could share memory.
    seed: of dummy weights. A request without a seed of its own gets a random one.
    load_format dummy: random weights in the number format of the checkpoint's config, beyond which nothing is read; the
        names of configs/shapes/ are models too, of which there is no more than that.
    quantization: auto = as the checkpoint is; none = floats, whatever the checkpoint is; int8, int4, fp8 = made of any
        checkpoint while loading; the name of a checkpoint's own format asks for just that.
    quantize_lm_head: false = the head (and an embedding tied to it) stays in floats.
    batch_invariant: a request gets bit-identical logits alone or batched, whole or in chunks, fresh or resumed, and in
        any layout of ranks. The native CPU ops do so always within one layout; true = send more between ranks for the
        last, and refuse to start where it is not so.
    kernels: force one kernel body ("ref", "cpu", "triton"); None = the best available.
    runner: pooling = serve the model for embeddings, scores or classes alone; generate = refuse one that cannot
        generate; auto = what its files say it is made for.
    convert: what else a model that generates is served for: auto and embed = its hidden states are embeddings, none =
        nothing. classify = refuse one without classes.
    pooler_config: JSON, changes how vectors are made: {"pooling_type": "MEAN", "normalize": true}. See PoolerConfig.
    """

    model: str = "smollm2-135m"
    tokenizer: str | None = None
    revision: str | None = None
    download_dir: str | None = None
    dtype: DType = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    max_model_len: int | None = None
    block_size: int = 16
    num_gpu_blocks_override: int | None = None
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    kv_cache_dtype: KVDType = "auto"
    enable_prefix_caching: bool = True
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_num_queued_reqs: int | None = None
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    scheduling_policy: Policy = "fcfs"
    async_scheduling: bool = True
    enforce_eager: bool = False
    disable_custom_all_reduce: bool = False
    load_format: Literal["auto", "dummy"] = "auto"
    quantization: Quantization = "auto"
    quantize_lm_head: bool = True
    batch_invariant: bool = False
    kernels: str | None = None
    trust_remote_code: bool = False
    runner: Literal["auto", "generate", "pooling"] = "auto"
    convert: Literal["auto", "none", "embed", "classify"] = "auto"
    pooler_config: str | None = None

    @property
    def sizes_kv_by_utilization(self) -> bool:
        """On a GPU: from gpu_memory_utilization, and not from a size of its own."""
        return self.kv_cache_memory_bytes is None and self.num_gpu_blocks_override is None

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def pooler(self) -> PoolerConfig:
        """What `pooler_config` says."""
        return parse_pooler_config(self.pooler_config)

    @property
    def is_fake(self) -> bool:
        """Whether there is no model at all (see `model`)."""
        return self.model == "fake" or self.model.startswith("fake:")

    def __post_init__(self) -> None:
        _at_least("max_model_len", self.max_model_len, 2)
        _at_least("num_gpu_blocks_override", self.num_gpu_blocks_override, 2)
        _at_least("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1)
        _at_least("tensor_parallel_size", self.tensor_parallel_size, 1)
        _at_least("pipeline_parallel_size", self.pipeline_parallel_size, 1)
        _at_least("max_num_seqs", self.max_num_seqs, 1)
        _at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _at_least("max_num_queued_reqs", self.max_num_queued_reqs, 0)
        _at_least("long_prefill_token_threshold", self.long_prefill_token_threshold, 0)
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _one_of("kv_cache_dtype", self.kv_cache_dtype, get_args(KVDType))
        _one_of("device", self.device, ("auto", "cpu", "cuda"))
        _one_of("scheduling_policy", self.scheduling_policy, ("fcfs", "priority"))
        _one_of("quantization", self.quantization, get_args(Quantization))
        _one_of("runner", self.runner, ("auto", "generate", "pooling"))
        _one_of("convert", self.convert, ("auto", "none", "embed", "classify"))
        parse_pooler_config(self.pooler_config)
        _one_of("load_format", self.load_format, ("auto", "dummy"))
        if self.block_size not in (8, 16, 32, 64, 128):
            raise ConfigError(f"block_size must be 8, 16, 32, 64 or 128, got {self.block_size}.")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running sequence can get a token each step."
            )


def _at_least(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise ConfigError(f"{name} must be at least {low}, got {value}.")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
