"""Finds and loads the compiled library that fits this CPU.

Knows the instruction sets, the structs of arguments and where pip leaves the libraries. Does not know tensors' meaning.
ctypes releases the GIL while a function of the library runs.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import struct
from collections.abc import Callable
from ctypes import c_char_p, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

log = logging.getLogger(__name__)

# Best first; with the flags of /proc/cpuinfo that a library needs. The kernel lists only what it lets programs use.
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma"})
ISAS: dict[str, frozenset[str]] = {
    "avx512_bf16": _AVX512 | {"avx512_vnni", "avx512_bf16"},
    "avx512_vnni": _AVX512 | {"avx512_vnni"},
    "avx512": _AVX512,
    "avx2": frozenset({"avx2", "fma"}),
    "base": frozenset(),
}

# The fields of each op's struct in abi.h, all of 8 bytes: q = pointer or integer, d = double.
FIELDS: dict[str, str] = {
    "paged_attention": "7q10qdqd3q",
    "write_kv": "5q13q",
    "copy_blocks": "3q5q",
    "rms_norm": "3q5qd3q",
    "add_rms_norm": "3q4qd3q",
    "rotary": "4q10q",
    "silu_and_mul": "2q5q",
    "gelu_tanh_and_mul": "2q5q",
    "gelu_tanh": "2q5q",
    "linear": "4q13q",
    "embedding": "3q17q",
    "mask_logits": "3q4q",
    "find_peaks": "4q3q",
    "draw": "10q3q",
    "take_logprobs": "6q4q",
}


@dataclass(frozen=True, slots=True)
class Op:
    """One function of a library. call: with the packed arguments, whose bytes it reads until it returns."""

    name: str
    pack: Callable[..., bytes]
    call: Callable[[bytes], None]
    address: int


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The first CPU's feature flags; empty where the system does not tell or the CPU is no x86-64."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not cpuinfo.exists():
        return frozenset()
    with cpuinfo.open() as lines:
        for line in lines:
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def runnable(folder: Path = Path(__file__).parent) -> dict[str, Path]:
    """The libraries that are built and that this CPU can run, best first."""
    flags = cpu_flags()
    found: dict[str, Path] = {}
    for isa, needs in ISAS.items():
        paths = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_{isa}{suffix}").exists()]
        if paths and needs <= flags:
            found[isa] = paths[0]
    return found


@lru_cache
def open_library(path: Path) -> tuple[ctypes.CDLL, dict[str, Op]]:
    """Load a library, declare its functions and lend it torch's threads."""
    library = ctypes.CDLL(str(path))
    ops = {}
    for name, fields in FIELDS.items():
        function = getattr(library, f"octavo_{name}")
        function.argtypes, function.restype = (c_char_p,), None
        address = ctypes.cast(function, c_void_p).value or 0
        ops[name] = Op(name, struct.Struct(f"={fields}").pack, function, address)
    library.octavo_set_fork.argtypes, library.octavo_set_fork.restype = (c_void_p,), None
    library.octavo_set_fork(_torch_fork())
    library.octavo_replay.argtypes, library.octavo_replay.restype = (c_void_p, c_int64, c_int64, c_void_p), None
    return library, ops


def _torch_fork() -> int | None:
    """Address of the entry point of torch's own OpenMP runtime, whichever file that is. None: one thread."""
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # A lookup through a handle searches what the library itself is linked with.
        return ctypes.cast(ctypes.CDLL(str(torch_cpu)).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        log.warning("CPU kernels run on one thread: torch's OpenMP runtime was not found.")
        return None
