"""How results are shown (rich tables) and kept (JSON files that say what was run, on what, from which commit)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "benchmarks"
PACKAGES = ("octavo", "torch", "triton", "transformers", "ray", "numpy")

# A file or a pipe has no width to fit into: tables keep their columns there.
console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def table(columns: Sequence[str], left: int = 1) -> Table:
    """An empty table; the first `left` columns are words, the others numbers."""
    made = Table()
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index < left else "right")
    return made


def show(title: str, table: Table) -> None:
    """Print a table under its title (rich's own titles are broken into lines as narrow as the table)."""
    console.print(f"\n[bold]{title}[/bold]")
    console.print(table)


def save(name: str, settings: dict[str, Any], results: Any, path: Path | None = None) -> Path:
    """Write a result file (default build/benchmarks/<name>-<time>.json) and say where it is."""
    path = path or RESULTS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()},
        "results": results,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
    console.print(f"[dim]written to {path}[/dim]")
    return path


def commit() -> str | None:
    """The commit of the working tree, with "+changes" if it differs; None outside of git."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + "+changes" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> dict[str, Any]:
    return {
        "cpu": _first(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _first(Path("/proc/meminfo"), "MemTotal"),
        "gpus": _gpus(),
        "load_1min": os.getloadavg()[0],
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _first(path: Path, key: str) -> str | None:
    """The value of the first line "key : value" of a file under /proc."""
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _gpus() -> list[str]:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
