"""The engines that are compared, each in one set-up, and how their processes are started.

Knows virtual environments, environment variables and arguments of the workers. Measures nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from report import console
from venvs import find_python, is_unfinished, libiomp5, make_venv

WORKERS = Path(__file__).parent / "workers"
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


@dataclass(frozen=True, slots=True)
class Variant:
    """An engine in one set-up. engine: its worker, and its venv. weights: how it keeps them; "gguf": as the file does.

    options: fields of EngineConfig (octavo). flags: further arguments (vllm). bound: threads bound to cores (vllm).
    """

    name: str
    engine: str
    weights: Literal["float32", "int8", "gguf"] = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    bound: bool = False


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("octavo", "octavo"),
        # Quantized weights with the dtype that octavo chooses: bfloat16 activations and KV where the CPU has them.
        Variant("octavo-int8", "octavo", "int8", {"quantization": "int8", "dtype": "auto"}),
        Variant("octavo-gguf", "octavo", "gguf", {"dtype": "auto"}),
        Variant("transformers", "transformers"),
        Variant("vllm", "vllm"),
        Variant("vllm-best", "vllm", bound=True),
        Variant("vllm-best-eager", "vllm", flags=("--eager",), bound=True),
        Variant("llama", "llama", "gguf"),
    )
}


@dataclass(frozen=True, slots=True)
class Start:
    """How a variant's process is started."""

    command: tuple[str | Path, ...]
    environment: dict[str, str]


def start(variant: Variant, python: Path, threads: int, octavo_options: Mapping[str, Any]) -> Start:
    environment, arguments = dict(QUIET), list(variant.flags)
    if variant.engine in ("octavo", "transformers"):
        environment["OMP_NUM_THREADS"] = str(threads)
    if variant.engine == "octavo":
        arguments.append(json.dumps({**variant.options, **octavo_options}))
    if variant.engine == "llama":
        arguments.append(json.dumps({"threads": threads}))
    if variant.engine == "vllm":
        environment |= VLLM
    if variant.bound:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        library = libiomp5(python)
        if library is not None:
            environment["LD_PRELOAD"] = str(library)
    return Start((python, WORKERS / f"worker_{variant.engine}.py", *arguments), environment)


def pythons(engines: Sequence[str], venvs: Path, install: bool) -> dict[str, Path]:
    """The interpreter of each engine; an engine without one is left out, with a word about it."""
    found: dict[str, Path] = {}
    for name in dict.fromkeys(engines):
        if name == "octavo":
            found[name] = Path(sys.executable)
            continue
        python = None if is_unfinished(venvs, name) else find_python(venvs, name)
        if python is None and install:
            python = make_venv(venvs, name)
        if python is None and name == "transformers":
            console.print("transformers runs in octavo's own venv (--install makes it one of its own).")
            python = Path(sys.executable)
        if python is None:
            console.print(f"[yellow]{name} is left out: no venv {venvs / name} (--install makes it).[/yellow]")
            continue
        found[name] = python
    return found
