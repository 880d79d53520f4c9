"""Builds a rank in this process: checkpoint → its part of the model → KV pool → runner; and an engine of one rank.

The torch half of octavo.engine.build, which is the door. In two steps, since ranks must agree on the number of KV
blocks: `build_part` loads the weights and says how many fit, `Part.allocate` takes as many as are to be had everywhere.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from octavo.engine import env
from octavo.engine.build import Engine, Phases, assemble
from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError
from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.decoder import CausalLM
from octavo.engine.loader.assign import load_weights
from octavo.engine.loader.checkpoint import open_checkpoint
from octavo.engine.loader.dummy import init_dummy
from octavo.engine.loader.source import resolve_model
from octavo.engine.models.registry import build_model, max_model_len, role_of
from octavo.engine.parallel.connect import HostedRendezvous, Rendezvous, connect
from octavo.engine.parallel.mesh import Mesh
from octavo.engine.pooling.build import pooling_info, sentence_folder
from octavo.engine.pooling.worker import Pooler, activation_of
from octavo.engine.process.inproc import InProcess, rank_thread
from octavo.engine.process.rank import RankSpec
from octavo.engine.process.watchdog import STARTING_S
from octavo.engine.process.wire import Begin
from octavo.engine.quant.gather import stored_matrices
from octavo.engine.quant.methods import choose_methods
from octavo.engine.quant.scheme import read_scheme
from octavo.engine.runner.buffers import Buffers, StepInputs
from octavo.engine.runner.capability import Wanted, check_gpu, check_triton, gpu_of
from octavo.engine.runner.device import is_host
from octavo.engine.runner.device_buffers import DeviceBuffers
from octavo.engine.runner.device_memory import memory_of
from octavo.engine.runner.graph import StepGraphs
from octavo.engine.runner.kv_pool import KVPool, plan_num_blocks
from octavo.engine.runner.runner import Runner
from octavo.engine.runner.sampling_state import SamplingState
from octavo.engine.runner.stage import Stage
from octavo.engine.runner.whole_steps import WholeSteps
from octavo.engine.types import EngineInfo, GenerationDefaults
from octavo.kernels import ops as kernel_ops

LOADING_THREADS = 4  # of a CPU: as many layers are finished at once, more than memory is fast enough for


def build_local(config: EngineConfig, phases: Phases) -> Engine:
    """Build everything in this process. Raises ConfigError."""
    thread = rank_thread()

    def build() -> tuple[Runner, EngineInfo]:
        part = build_part(config, Mesh(), phases)
        with phases.phase("KV cache"):
            info = part.info
            if config.max_model_len is None:
                length = min(info.max_model_len, info.num_blocks * info.block_size)
                info = replace(info, max_model_len=length)
            return part.allocate(info.num_blocks, info.max_model_len), info

    try:
        runner, info = thread.submit(build).result()
        engine = assemble(config, info, InProcess(thread, runner))
    except BaseException:
        thread.shutdown(wait=False)
        raise
    return replace(engine, info=replace(info, phases=tuple(phases.done)))


class RankBuilder:
    """How a rank process gets its part (see octavo.engine.process.rank)."""

    def host(self, address: str, spec: RankSpec) -> tuple[str, int]:
        self._hosted = HostedRendezvous(address, STARTING_S, spec.step_timeout_s)  # lives as long as this builder
        return self._hosted.rendezvous.host, self._hosted.rendezvous.port

    def build(self, spec: RankSpec, begin: Begin, phases: Phases) -> Part:
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        with phases.phase("connect ranks"):
            rendezvous = begin.rendezvous and Rendezvous(*begin.rendezvous, STARTING_S, spec.step_timeout_s)
            device, shared = pick_device(spec.config.device), not spec.config.disable_custom_all_reduce
            mesh = connect(spec.layout, spec.rank, rendezvous, device, custom_all_reduce=shared)
        return build_part(spec.config, mesh, phases, begin.ranks_on_node)


@dataclass(frozen=True, slots=True)
class Part:
    """A rank's part of the engine, its weights loaded. info: of an engine that this rank had to hold alone. activation:
    of class scores."""

    info: EngineInfo
    config: EngineConfig
    model: CausalLM
    context: BuildContext
    activation: Callable[[torch.Tensor], torch.Tensor]

    def allocate(self, num_blocks: int, max_model_len: int) -> Runner:
        """The KV pool and the buffers, and the runner that uses them."""
        config, context, model = self.config, self.context, self.model
        pool = KVPool.allocate(model.kv_specs(), num_blocks, config.block_size, context.device)
        sampling = SamplingState(config.max_num_seqs, max_model_len, self.info.vocab_size, context.device, context.ops)
        stage = Stage(context.mesh.pp, model.width, context.dtype, context.device)
        pooler = Pooler(model, self.activation)
        sizes = (config.max_num_seqs, max_model_len, config.block_size)
        hidden = None if stage.is_first else (model.width, context.dtype)
        ops, device = context.ops, context.device
        if is_host(device):
            buffers = Buffers(*sizes)
            graphs = StepGraphs(
                model,
                pool.caches,
                ops,
                buffers.max_num_seqs,
                buffers.table_width,
                hidden,
                collective=not context.mesh.tp.recordable,
            )
            return Runner(model, pool, ops, buffers, sampling, device, stage, graphs, pooler)

        def forward(inputs: StepInputs) -> torch.Tensor:
            return model(inputs.x, inputs.positions, pool.caches, inputs.attention)

        there = DeviceBuffers(*sizes, device)
        recording = ops if context.mesh.tp.recordable else replace(ops, record=None)
        replay = WholeSteps(model, pool.caches, recording, there, hidden)
        return Runner(model, pool, ops, there, sampling, device, stage, forward, pooler, replay)

    def close(self) -> None:
        self.context.mesh.close()


def build_part(config: EngineConfig, mesh: Mesh, phases: Phases, ranks_on_node: int = 1) -> Part:
    """Build this rank's part of the model and load its weights. Raises ConfigError, as far as possible before loading.

    ranks_on_node: of the replica, that share this machine's memory.
    """
    device = pick_device(config.device)
    memory = memory_of(config, device, ranks_on_node)
    with phases.phase("find model"):
        dummy = config.load_format == "dummy"
        place = config.download_dir
        source = resolve_model(config.model, revision=config.revision, download_dir=place, shapes=dummy)
        checkpoint = open_checkpoint(source, trust_remote_code=config.trust_remote_code, weights=not dummy)
        folder = sentence_folder(source.path)
        runner = "pooling" if folder is not None and config.runner == "auto" else config.runner
        role = role_of(checkpoint.config, runner, config.convert)
        dtype = pick_dtype(config.dtype, device, exact=not role.is_causal)
        length = _context_length(config, max_model_len(checkpoint.config), folder.max_length if folder else None)
    with phases.phase("build model"):
        ops = _ops(config, device, dtype)
        scheme = read_scheme(checkpoint.config)
        stored = "gguf" if source.kind == "gguf" else scheme.method if scheme else None
        methods = choose_methods(config.quantization, config.quantize_lm_head, stored, ops)
        kv_dtype = pick_kv_dtype(config.kv_cache_dtype, dtype, ops)
        if device.type == "cuda":
            in_float8 = methods.name == "fp8" or (methods.name == stored and scheme is not None and scheme.has_float8)
            check_gpu(gpu_of(device), Wanted("triton" in dict(ops.bodies).values(), dtype, kv_dtype, in_float8))
        context = BuildContext(
            mesh=mesh,
            ops=ops,
            dtype=dtype,
            device=device,
            max_model_len=length,
            kv_dtype=kv_dtype,
            linear_method=methods.linear,
            head_method=methods.head,
            table_method=methods.table,
            whole_products=config.batch_invariant or methods.rounds_inputs,
        )
        model = build_model(checkpoint.config, context, role)
        pooling = pooling_info(config, role, checkpoint.config, model.feature_size, folder)
        memory.check_weights(model, context, methods.name)
    with phases.phase("load weights"), _one_thread() as threads, memory.loading():
        if dummy:
            init_dummy(model, config.seed, device, scheme)
        else:
            weights: Any = checkpoint.weights()
            weights = weights if scheme is None else stored_matrices(weights, scheme)
            workers = min(threads, LOADING_THREADS) if device.type == "cpu" else 1
            load_weights(model, weights, device=device, workers=workers)
    with phases.phase("measure memory"):
        specs, positions = model.kv_specs(), context.num_positions
        num_blocks = plan_num_blocks(config, specs, positions, lambda: memory.for_kv(model, context))
        measured = memory.measured
    info = EngineInfo(
        model=source.name,
        max_model_len=length,
        vocab_size=checkpoint.config.vocab_size,
        eos_token_ids=checkpoint.eos_token_ids,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        block_size=config.block_size,
        num_blocks=num_blocks,
        generation_defaults=checkpoint.generation_defaults or GenerationDefaults(),
        quantization=methods.name,
        batch_invariant=ops.batch_invariant,
        pooling=pooling,
        kv_block_bytes=config.block_size * sum(spec.bytes_per_token for spec in specs),
        weights_bytes=measured.weights if measured else 0,
        steps_bytes=measured.used - measured.weights if measured else 0,
    )
    return Part(info, config, model, context, activation_of(checkpoint.config))


def pick_device(name: str) -> torch.device:
    """auto = the first GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no CUDA GPU here: use device cpu, or install a CUDA torch.")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device, exact: bool = False) -> torch.dtype:
    """auto = bfloat16 on a GPU and on a CPU that multiplies it natively (twice the rate of float32), else float32.

    exact: of an encoder, which is small, and whose result is compared with ones that were computed elsewhere: float32
    on a CPU.
    """
    if name == "auto":
        if exact and device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if device.type == "cuda" or _cpu_has_bf16() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def pick_kv_dtype(name: str, dtype: torch.dtype, ops: kernel_ops.Ops) -> torch.dtype:
    """auto = the model's."""
    if name in ("fp8", "fp8_e4m3"):
        if dict(ops.bodies)["write_kv"] == "cpu":
            raise ConfigError(
                "The native CPU kernels have no kv_cache_dtype fp8: use int8, which takes as much memory."
            )
        return torch.float8_e4m3fn
    return dtype if name == "auto" else getattr(torch, name)


def _cpu_has_bf16() -> bool:
    cpu = torch.backends.cpu.get_cpu_capability()
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return cpu.startswith("AVX512") and bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))


@contextmanager
def _one_thread() -> Iterator[int]:
    """How many there were. Loading is many small tensor operations, bound by memory: a second thread for one of them
    adds little when cores are free, and makes each operation wait for the slowest when they are not (start-up, when
    Ray's processes start too). Whole layers are another matter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _ops(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> kernel_ops.Ops:
    if device.type == "cuda":
        check_triton(config.kernels, importlib.util.find_spec("triton") is not None)
    try:
        ops = kernel_ops.select(device, dtype, config.kernels, env.cpu_isa())
    except (ValueError, ImportError) as error:
        raise ConfigError(f"These kernels cannot be used here: {error}.") from error
    if config.batch_invariant and not ops.batch_invariant:
        bodies = ", ".join(sorted({body for _, body in ops.bodies}))
        raise ConfigError(
            f"batch_invariant is not to be had with the {bodies} kernels and dtype {dtype}: only the native CPU ops "
            f"guarantee it, in float32 and bfloat16."
        )
    return replace(ops, record=None) if config.enforce_eager else ops


def _context_length(config: EngineConfig, of_model: int, trained: int | None) -> int:
    """The longest sequence to serve, before the KV pool is known. trained: what its authors say texts should have."""
    if config.max_model_len is None:
        return of_model if trained is None else min(of_model, trained)
    if config.max_model_len > of_model:
        raise ConfigError(
            f"max_model_len ({config.max_model_len}) is longer than the {of_model} tokens this model was made for."
        )
    return config.max_model_len
