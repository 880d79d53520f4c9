"""Finds and loads the compiled library that fits this CPU.

Knows the instruction sets, the C signatures and where pip leaves the libraries. Does not know tensors' meaning.
ctypes releases the GIL while a function of the library runs.
"""

from __future__ import annotations

import ctypes
import logging
import platform
from ctypes import c_float, c_int, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

log = logging.getLogger(__name__)

# Best first; with the flags of /proc/cpuinfo that a library needs. The kernel lists only what it lets programs use.
ISAS: dict[str, frozenset[str]] = {
    "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma"}),
    "avx2": frozenset({"avx2", "fma"}),
    "base": frozenset(),
}

_P, _I, _F, _N = c_void_p, c_int64, c_float, c_int
SIGNATURES: dict[str, tuple[type, ...]] = {
    "paged_attention": (*[_P] * 7, *[_I] * 10, _F, _I, _F, *[_N] * 3),
    "write_kv": (*[_P] * 5, *[_I] * 10, *[_N] * 3),
    "copy_blocks": (*[_P] * 3, *[_I] * 4, _N),
    "rms_norm": (*[_P] * 3, *[_I] * 5, _F, *[_N] * 3),
    "add_rms_norm": (*[_P] * 3, *[_I] * 4, _F, *[_N] * 3),
    "rotary": (*[_P] * 4, *[_I] * 8, *[_N] * 2),
    "silu_and_mul": (*[_P] * 2, *[_I] * 3, *[_N] * 2),
    "gelu_tanh_and_mul": (*[_P] * 2, *[_I] * 3, *[_N] * 2),
}


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


def open_library(path: Path) -> ctypes.CDLL:
    """Load a library, declare its functions' arguments and lend it torch's threads."""
    library = ctypes.CDLL(str(path))
    for name, arguments in SIGNATURES.items():
        function = getattr(library, f"octavo_{name}")
        function.argtypes, function.restype = arguments, None
    library.octavo_set_fork.argtypes, library.octavo_set_fork.restype = (c_void_p,), None
    library.octavo_set_fork(_torch_fork())
    return library


def _torch_fork() -> int | None:
    """Address of the entry point of torch's own OpenMP runtime, whichever file that is. None: one thread."""
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # A lookup through a handle searches what the library itself is linked with.
        return ctypes.cast(ctypes.CDLL(str(torch_cpu)).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        log.warning("CPU kernels run on one thread: torch's OpenMP runtime was not found.")
        return None
