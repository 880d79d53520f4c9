"""Every environment variable octavo reads, in one place. A malformed value is an error, never ignored."""

from __future__ import annotations

import os
from pathlib import Path

from octavo.engine.errors import ConfigError


def cache_dir() -> Path:
    """OCTAVO_CACHE: where downloaded and converted files are kept (default ~/.cache/octavo)."""
    return Path(os.environ.get("OCTAVO_CACHE") or Path.home() / ".cache" / "octavo")


def api_key() -> str | None:
    """OCTAVO_API_KEY: the key clients must send; unset or empty = none."""
    return os.environ.get("OCTAVO_API_KEY") or None


def cpu_isa() -> str | None:
    """OCTAVO_CPU_ISA: force the instruction set of the native CPU ops: avx512, avx2 or base; unset = the best here."""
    value = os.environ.get("OCTAVO_CPU_ISA") or None
    if value not in (None, "avx512", "avx2", "base"):
        raise ConfigError(f"OCTAVO_CPU_ISA must be avx512, avx2 or base, got {value!r}.")
    return value


def prepare_local_cluster(threads: int) -> None:
    """Settings that the processes of a Ray cluster inherit from who starts it, unless the user has set them.

    OMP_NUM_THREADS: threads a replica computes with; Ray would set it to 1. RAY_SERVE_LOG_TO_STDERR: Serve's own log
    lines go to its files alone, so that what the terminal shows is ours.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
