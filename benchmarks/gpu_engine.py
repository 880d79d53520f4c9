"""gpu.py's sections of whole models: the engine as users have it, with dummy weights, beside the memory's speed.

Knows the engine from outside: requests in, tokens out, counters. Tokens per second are those of a window of steps in
which every row decodes; prompts, compiling and captures of graphs lie before it.
"""

from __future__ import annotations

import gc
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu_models
import load_weights
import torch
from floor import Machine, ModelShape, decode_s, prefill_s
from gpu_profile import profiled
from gpu_rows import Bench, Row

from octavo.engine.build import Engine, build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.core.engine import EngineCore
from octavo.engine.params import SamplingParams
from octavo.engine.types import Request


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the measured steps. batch and its context; prompt: of the prefill; window: steps that are measured."""

    batch: int
    context: int
    prompt: int
    window: int
    settling: int  # steps before the window: kernels are compiled and graphs captured


FULL = Sizes(64, 1024, 8192, 96, 12)
SMALL = Sizes(2, 40, 48, 2, 1)


@dataclass(frozen=True, slots=True)
class Window:
    """Of some steps of a batch. seconds: by the host's clock. gap_s: that the device stood still meanwhile, as the
    engine counts it."""

    steps: int
    tokens: int
    seconds: float
    gap_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class Decoding:
    """Requests of one length that decode together, until `close`. Prompts are random: nothing is found in a cache."""

    def __init__(self, core: EngineCore, batch: int, context: int, room: int, vocab: int) -> None:
        self._core = core
        self._ids = _submit(core, batch, context, room, vocab)
        waiting = set(self._ids)
        while waiting:
            for delta in core.step():
                assert delta.error is None, delta.error
                waiting.discard(delta.request_id)

    def steps(self, count: int) -> Window:
        before, begin, tokens = self._core.stats(), time.perf_counter(), 0
        for _ in range(count):
            tokens += sum(len(delta.token_ids) for delta in self._core.step())
        seconds, after = time.perf_counter() - begin, self._core.stats()
        return Window(count, tokens, seconds, after.gap_s - before.gap_s)

    def close(self) -> None:
        for request_id in self._ids:
            self._core.abort(request_id)
        while self._core.has_work:
            self._core.step()


def _submit(core: EngineCore, batch: int, prompt: int, tokens: int, vocab: int) -> list[str]:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    ids = [f"request-{secrets.token_hex(4)}" for _ in range(batch)]
    for request_id in ids:
        core.add(Request(request_id, tuple(torch.randint(3, vocab, (prompt,)).tolist()), params))
    return ids


def whole_run(core: EngineCore, batch: int, prompt: int, tokens: int, vocab: int) -> float:
    """Seconds from the first request to the last token."""
    begin = time.perf_counter()
    _submit(core, batch, prompt, tokens, vocab)
    while core.has_work:
        for delta in core.step():
            assert delta.error is None, delta.error
    return time.perf_counter() - begin


@contextmanager
def started(bench: Bench, config: gpu_models.Config, **options: Any) -> Iterator[Engine]:
    """An engine with dummy weights; what its start took is a row. Its memory is free afterwards."""
    sizes = SMALL if bench.tiny else FULL
    config = config | (gpu_models.TINY if bench.tiny else {})
    settings: dict[str, Any] = {
        "load_format": "dummy",
        "device": bench.device.type,
        "max_num_seqs": sizes.batch,
        "max_num_batched_tokens": sizes.prompt,
        "max_model_len": max(sizes.prompt + 32, sizes.context + 512),
        "enable_prefix_caching": False,
    }
    if bench.tiny:
        settings |= {"num_gpu_blocks_override": 256, "max_model_len": 512, "dtype": "float32"}
    if bench.device.type == "cpu":
        settings |= {"kernels": "ref"}
    with tempfile.TemporaryDirectory() as folder:
        path = gpu_models.write(config, Path(folder) / "model")
        begin = time.perf_counter()
        engine = build_engine(EngineConfig(model=str(path), **settings | options))
        seconds = time.perf_counter() - begin
        phases = ", ".join(f"{name} {took:.1f}" for name, took in engine.info.phases)
        name = f"start of {config['model_type']}, {engine.info.quantization}"
        bench.row(Row(name, "dummy weights", seconds, "s", note=f"{phases}; {engine.info.num_blocks} KV blocks"))
        try:
            yield engine
        finally:
            engine.core.close()
            del engine
            gc.collect()
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()


def machine_of(bench: Bench) -> Machine:
    rates = bench.rates
    return Machine(rates.matmul / 1e9, rates.read / 1e9, rates.copy / 1e9, 1, "bfloat16")


def decode_row(bench: Bench, engine: Engine, what: str, shape: ModelShape, batch: int, goal: float | None) -> Window:
    """A row of tokens/s, and where there are several rows in a step one of the host's gap."""
    sizes = SMALL if bench.tiny else FULL
    context = sizes.context if batch > 1 else sizes.context // 8
    profiled_steps = 2 if bench.tiny else 6
    room = sizes.settling + sizes.window + 2 * profiled_steps + 8
    decoding = Decoding(engine.core, batch, context, room, engine.info.vocab_size)
    first = decoding.steps(1)
    decoding.steps(sizes.settling)
    window = decoding.steps(sizes.window)
    mean_context = context + sizes.settling + 2 + sizes.window / 2
    floor = batch / decode_s(machine_of(bench), shape, batch, mean_context if batch > 1 else 0)
    why = partial(profiled, partial(decoding.steps, profiled_steps))
    of = "(weights + KV) ÷ read" if batch > 1 else "weights ÷ read"
    note = f"{1e3 * window.seconds / window.steps:.2f} ms a step, the first {1e3 * first.seconds:.0f} ms"
    share = window.tokens_per_s / floor
    sized = f"n={batch}, context {mean_context:.0f}"
    bench.row(Row(what, sized, window.tokens_per_s, "tokens/s", floor, of, share, goal, note=note), why)
    if batch > 1:
        gap, step = (1e3 * seconds / window.steps for seconds in (window.gap_s, window.seconds))
        bench.row(Row("host gap between steps", sized, gap, "ms", step, "the step", gap / step, 0.03, True), why)
    decoding.close()
    return window


def bf16(bench: Bench) -> None:
    """Llama 3.1 8B: decode, prefill, what start and memory take, and the work that transformers is given later."""
    sizes, config = (SMALL if bench.tiny else FULL), gpu_models.LLAMA | (gpu_models.TINY if bench.tiny else {})
    shape = gpu_models.shape_of(config)
    with started(bench, gpu_models.LLAMA) as engine:
        one = decode_row(bench, engine, "8B bf16 decode", shape, 1, 0.88)
        bench.figure("bf16 decode", one.tokens_per_s)
        decode_row(bench, engine, "8B bf16 decode", shape, sizes.batch, 0.80)
        prefill_row(bench, engine, shape, sizes.prompt)
        tokens = 4 if bench.tiny else 128
        seconds = whole_run(engine.core, sizes.batch, sizes.context, tokens, engine.info.vocab_size)
        bench.figure("whole run", sizes.batch * tokens / seconds)
        recording_row(bench, engine)
        memory_row(bench, engine)


def prefill_row(bench: Bench, engine: Engine, shape: ModelShape, prompt: int) -> None:
    run = partial(whole_run, engine.core, 1, prompt, 1, engine.info.vocab_size)
    run()
    seconds = sorted(run() for _ in range(1 if bench.tiny else 5))
    took = seconds[len(seconds) // 2]
    least = prefill_s(machine_of(bench), shape, 1, prompt)
    row = Row(
        "8B bf16 prefill", f"{prompt} tokens", prompt / took, "tokens/s", prompt / least, "matmul", least / took, 0.75
    )
    bench.row(row, partial(profiled, run))


def recording_row(bench: Bench, engine: Engine) -> None:
    """What the first decode step of a new size takes beyond the others: its graph is recorded in it."""
    batch = 2 if bench.tiny else 24
    _submit(engine.core, batch, 8, 12, engine.info.vocab_size)
    seconds = []
    while engine.core.has_work:
        begin = time.perf_counter()
        engine.core.step()
        seconds.append(time.perf_counter() - begin)
    longest = max(seconds) - sorted(seconds)[len(seconds) // 2]
    bench.row(Row("recording a decode step", f"n={batch}", 1e3 * longest, "ms", note="beyond a replay"))


def memory_row(bench: Bench, engine: Engine) -> None:
    """What the allocator holds beyond what is used."""
    if bench.device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info()
    held, used = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    note = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free; {(held - used) / 1e9:.2f} GB held but unused"
    bench.row(Row("memory", "after all steps", torch.cuda.max_memory_allocated() / 1e9, "GB", note=note))


def fp8(bench: Bench) -> None:
    """Qwen3 8B, in bfloat16 and as Qwen3-8B-FP8 stores it: blocks of 128 × 128 with a scale each."""
    shape = gpu_models.shape_of(gpu_models.QWEN | (gpu_models.TINY if bench.tiny else {}))
    with started(bench, gpu_models.QWEN) as engine:
        plain = decode_row(bench, engine, "Qwen3 8B bf16 decode", shape, 1, None).tokens_per_s
    with started(bench, gpu_models.QWEN_FP8) as engine:
        quantized_row(bench, engine, "FP8 8B decode", shape, plain, 1.6)


def w4a16(bench: Bench) -> None:
    """Llama 3.1 8B as GPTQ stores it: codes of four bits in groups of 128, the head in bfloat16."""
    plain = bench.known.get("bf16 decode")
    shape = gpu_models.shape_of(gpu_models.LLAMA | (gpu_models.TINY if bench.tiny else {}))
    with started(bench, gpu_models.LLAMA_W4A16) as engine:
        quantized_row(bench, engine, "W4A16 8B decode", shape, plain, 2.5)


def weight_bytes(bench: Bench, engine: Engine, shape: ModelShape) -> float | None:
    """What the weights take, all of them; None where it cannot be told. shape: for the size of KV."""
    if bench.device.type != "cuda":
        return None
    kv = engine.info.num_blocks * engine.info.block_size * shape.kv_bytes_per_token
    return torch.cuda.memory_allocated() - kv


def quantized_row(bench: Bench, engine: Engine, what: str, shape: ModelShape, plain: float | None, goal: float) -> None:
    """Beside the tokens/s of bfloat16, whose shape this is."""
    sizes = SMALL if bench.tiny else FULL
    weights = weight_bytes(bench, engine, shape)
    if weights is not None and weights > 0.8 * shape.weight_bytes and not bench.tiny:
        bench.row(Row(what, "n=1", note=f"weights take {weights / 1e9:.1f} GB: the dummies are not in this format"))
        return
    profiled_steps = 2 if bench.tiny else 6
    decoding = Decoding(
        engine.core, 1, sizes.context // 8, sizes.settling + sizes.window + profiled_steps + 8, engine.info.vocab_size
    )
    decoding.steps(sizes.settling)
    window = decoding.steps(sizes.window)
    rate = window.tokens_per_s
    share = None if plain is None else rate / plain
    note = f"{1e3 * window.seconds / window.steps:.2f} ms a step" + ("" if plain else "; bfloat16 was not measured")
    note += "" if weights is None else f"; weights take {weights / 1e9:.1f} GB"
    row = Row(what, "n=1", rate, "tokens/s", plain, "its bf16 rate", share, goal, note=note)
    bench.row(row, partial(profiled, partial(decoding.steps, profiled_steps)))
    decoding.close()


def loading(bench: Bench) -> None:
    """Weights from safetensors in the page cache, beside reading the files: load_weights.py has more of it."""
    kind, rounds, num_bytes = "bfloat16", 1 if bench.tiny else 3, 0 if bench.tiny else 1_200_000_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / kind
        load_weights.write(path, kind, num_bytes)
        (found,) = load_weights.measure(kind, path, bench.device, rounds, ["warm"])
    took, read, size = found.median(found.load), found.median(found.read), f"{found.num_bytes / 1e9:.2f} GB"
    share = found.ratio(found.read)
    row = Row("loading weights", size, took, "s", read, "reading the files", share, load_weights.GOAL, at_most=True)
    bench.row(row)


def transformers(bench: Bench) -> None:
    """`generate` of the same model, the same batch and lengths, beside ours; torch's attention, a cache that grows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes, tokens = (SMALL, 4) if bench.tiny else (FULL, 128)
    config = gpu_models.LLAMA | (gpu_models.TINY if bench.tiny else {})
    with tempfile.TemporaryDirectory() as folder, torch.device(bench.device):
        theirs = AutoConfig.from_pretrained(gpu_models.write(config, Path(folder) / "model"))
        dtype = torch.float32 if bench.tiny else torch.bfloat16
        model = AutoModelForCausalLM.from_config(theirs, dtype=dtype, attn_implementation="sdpa").eval()
        ids = torch.randint(3, config["vocab_size"], (sizes.batch, sizes.context))

    def generate(count: int) -> float:
        begin = time.perf_counter()
        wanted = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **wanted)
        assert tuple(out.shape) == (sizes.batch, sizes.context + count)
        out.tolist()  # waits
        return time.perf_counter() - begin

    generate(2)
    theirs_rate = sizes.batch * tokens / generate(tokens)
    ours = bench.known.get("whole run")
    share = None if ours is None else ours / theirs_rate
    note = f"{sizes.context} tokens in, {tokens} out" + ("" if ours else "; ours was not measured")
    of = "transformers generate"
    bench.row(Row("8B bf16, whole run", f"n={sizes.batch}", ours, "tokens/s", theirs_rate, of, share, 10.0, note=note))
