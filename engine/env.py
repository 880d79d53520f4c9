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
    """OCTAVO_CPU_ISA: force the instruction set of the native CPU ops; unset = the best here."""
    known = ("avx512_bf16", "avx512_vnni", "avx512", "avx2", "base")
    value = os.environ.get("OCTAVO_CPU_ISA") or None
    if value is not None and value not in known:
        raise ConfigError(f"OCTAVO_CPU_ISA must be one of {', '.join(known)}, got {value!r}.")
    return value


def prepare_shared_gpu_memory() -> None:
    """Settings that torch reads when GPUs are to share memory. To be called where no two ranks have the same GPU.

    TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES: without it, torch takes ranks that each see one GPU, number 0, for ranks
    on the same GPU. TORCH_SYMM_MEM_DISABLE_MULTICAST: we do not use it, and to set it up is one more thing to fail.
    """
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")


def prepare_gpu_allocator() -> None:
    """PYTORCH_ALLOC_CONF: torch's memory on a GPU lies in segments that grow, unless the user has set this, or
    PYTORCH_CUDA_ALLOC_CONF, which is its older name. To be called before torch first uses the GPU, best before it is
    imported; for an engine of one rank.

    Steps of every length take tensors of every size. From segments of fixed sizes, each would be cut otherwise, and
    what lies idle between them would have to be given back and asked for again, with a wait for the GPU. The pools of
    CUDA graphs grow too, or torch leaves them as they were, by its version. Ranks that share a model are left alone:
    NCCL registers the memory that a graph's collectives read, and libraries hand it to other processes, for neither of
    which segments that grow are sure to do.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def prepare_local_cluster(threads: int, haproxy_ports: tuple[int, int] | None) -> None:
    """Settings that the processes of a Ray cluster inherit from who starts it, unless the user has set them.

    To be called before Ray is imported. OMP_NUM_THREADS: threads a replica computes with; Ray would set it to 1.
    RAY_SERVE_LOG_TO_STDERR: Serve's own log lines go to its files alone, so that what the terminal shows is ours.
    RAY_SERVE_ENABLE_HA_PROXY, with ports for HAProxy's own metrics and statistics: HAProxy in front of the ingress
    instead of Serve's Python proxy; None leaves that one. RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S: how long an
    ingress that has nothing left to do stays, for proxies on other nodes to learn of it.
    RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S: HAProxy is reloaded whenever an ingress comes or goes; how long the one before
    may go on with its streams.
    """
    settings = {"OMP_NUM_THREADS": str(threads), "RAY_SERVE_LOG_TO_STDERR": "0"}
    if haproxy_ports is not None:
        settings["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
        settings["RAY_SERVE_HAPROXY_METRICS_PORT"] = str(haproxy_ports[0])
        settings["RAY_SERVE_HAPROXY_STATS_PORT"] = str(haproxy_ports[1])
        settings["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "1"
        settings["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] = "3600"
    for name, value in settings.items():
        os.environ.setdefault(name, value)
