"""A GPU's memory under mixed traffic, minute by minute: python benchmarks/gpu_memory.py --minutes 60

Requests of random lengths and every way to draw come and go, some are aborted, as many at a time as the engine may run
and half as many waiting. A row for each minute: what torch has allocated, and the most it had; what it holds of the GPU
(reserved); the part of that which is not allocated at the peak, that is what fragmentation costs; what the driver says
is free; how often torch had to give all it had cached back to find room (retries); what ran.

Goal: after the first minutes, in which steps are recorded and kernels compiled, reserved grows no more, and there are
no retries. Without a GPU the process' own memory stands in for reserved, and there are no other numbers: --model a
folder, for seeing that all of it runs. **Not run on a GPU yet.**
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from options import engine_options
from report import console, save, show, table

from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.core.engine import EngineCore
from octavo.engine.errors import ConfigError
from octavo.engine.params import SamplingParams
from octavo.engine.types import Request

MIB = 2**20
WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 0.7, "top_k": 50, "min_p": 0.02},
    {"temperature": 0.0, "logprobs": 5},
    {"temperature": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    {"temperature": 0.9, "n": 2},
)
ABORTED = 0.05  # of the requests


@dataclass(frozen=True, slots=True)
class Sample:
    """Bytes, and counters since the start. Without a GPU: reserved is the process' resident memory, the others 0."""

    minute: float
    allocated: int
    peak: int
    reserved: int
    free: int
    retries: int
    steps: int
    tokens: int
    preemptions: int

    @property
    def fragmented(self) -> float:
        """Part of reserved that was never allocated since the last sample, 0 … 1."""
        return 1 - self.peak / self.reserved if self.peak and self.reserved else 0.0


def requests(rng: random.Random, vocab: int, longest: int) -> Iterator[Request]:
    """Without end. Half of the prompts begin as others do; lengths are spread evenly over powers of two."""
    number = 0
    while True:
        number += 1
        prompt = min(longest // 2, int(2 ** rng.uniform(3, 13)))
        shared = rng.choice((0, prompt // 2))
        ids = [7] * shared + [rng.randrange(10, vocab) for _ in range(prompt - shared)]
        out = min(longest - len(ids) - 1, int(2 ** rng.uniform(2, 10)))
        params = SamplingParams(max_tokens=max(1, out), ignore_eos=True, seed=number, **rng.choice(WAYS))
        yield Request(str(number), tuple(ids), params)


def look(started: float, core: EngineCore, device: torch.device) -> Sample:
    stats = core.stats()
    counts = (stats.steps, stats.generation_tokens, stats.preemptions)
    minute = (time.monotonic() - started) / 60
    if device.type != "cuda":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return Sample(minute, 0, 0, pages * 4096, 0, 0, *counts)
    memory = torch.cuda.memory_stats(device)
    free, _ = torch.cuda.mem_get_info(device)
    sample = Sample(
        minute,
        memory["allocated_bytes.all.current"],
        memory["allocated_bytes.all.peak"],
        memory["reserved_bytes.all.current"],
        free,
        memory["num_alloc_retries"],
        *counts,
    )
    torch.cuda.reset_peak_memory_stats(device)
    return sample


def run(core: EngineCore, vocab: int, longest: int, at_once: int, seconds: float, every: float) -> Iterator[Sample]:
    """A sample at the start, and one every so many seconds."""
    rng = random.Random(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    coming, live = requests(rng, vocab, longest), dict[str, int]()
    started = time.monotonic()
    next_look = started
    while (now := time.monotonic()) < started + seconds:
        if now >= next_look:
            yield look(started, core, device)
            next_look += every
        while len(live) < at_once:
            request = next(coming)
            live[request.request_id] = request.params.n
            core.add(request)
        for delta in core.step():
            if delta.error is not None:
                raise SystemExit(f"error: a request failed: {delta.error}")
            if delta.finish_reason is not None:
                live[delta.request_id] -= 1
                if not live[delta.request_id]:
                    del live[delta.request_id]
        if live and rng.random() < ABORTED / 20:
            core.abort(rng.choice(list(live)))
    yield look(started, core, device)


def is_expandable() -> bool:
    """Whether torch's segments on the GPU grow (see octavo.engine.env.prepare_gpu_allocator)."""
    settings: dict[str, Any] = torch.cuda.memory._snapshot()["allocator_settings"]
    return bool(settings.get("expandable_segments"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="llama-3.1-8b", help="a shape of configs/shapes/ with dummy weights, or a model"
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=60, help="seconds between samples")
    parser.add_argument("--weights", choices=("dummy", "auto"), default="dummy")
    parser.add_argument("options", nargs="*", metavar="FIELD=VALUE", help="fields of EngineConfig")
    arguments = parser.parse_args()
    settings = {"max_model_len": 16384, "load_format": arguments.weights} | engine_options(arguments.options)
    try:
        config = EngineConfig(model=arguments.model, **settings)
        engine = build_engine(config)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    info = engine.info
    if torch.cuda.is_available():
        console.print(f"expandable segments: {'on' if is_expandable() else 'off'}")
    console.print(f"{info.num_blocks:,} KV blocks of {info.block_size} tokens")
    samples: list[Sample] = []
    at_once = config.max_num_seqs * 3 // 2
    try:
        for sample in run(
            engine.core, info.vocab_size, info.max_model_len, at_once, arguments.minutes * 60, arguments.every
        ):
            samples.append(sample)
            console.print(
                f"{sample.minute:6.1f} min  allocated {sample.allocated // MIB:,}  peak {sample.peak // MIB:,}  "
                f"reserved {sample.reserved // MIB:,} MiB  retries {sample.retries}  steps {sample.steps:,}"
            )
    finally:
        engine.core.close()
    report(samples)
    save("gpu_memory", {"model": arguments.model, "options": settings}, [asdict(sample) for sample in samples])


def report(samples: list[Sample]) -> None:
    columns = (
        "minute",
        "allocated",
        "peak",
        "reserved",
        "fragmented",
        "free",
        "retries",
        "steps",
        "tokens",
        "preempted",
    )
    rows = table(columns, left=0)
    for s in samples:
        sizes = [f"{count / MIB:,.0f}" for count in (s.allocated, s.peak, s.reserved)]
        counts = [f"{count:,}" for count in (s.retries, s.steps, s.tokens, s.preemptions)]
        rows.add_row(f"{s.minute:.1f}", *sizes, f"{s.fragmented:.1%}", f"{s.free / MIB:,.0f}", *counts)
    show("Memory by the minute (MiB)", rows)
    settled = samples[min(len(samples) - 1, max(1, len(samples) // 6))]
    grown = samples[-1].reserved - settled.reserved
    console.print(
        f"From minute {settled.minute:.1f} on: reserved {grown / MIB:+,.0f} MiB, "
        f"{samples[-1].retries - settled.retries} retries (goal: no growth, none)."
    )


if __name__ == "__main__":
    main()
