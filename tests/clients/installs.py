"""Clients that cannot live beside ours, or in Python at all: installed under build/ when a test first needs them."""

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

INSTALLED = Path(__file__).parents[2] / "build/clients"
INSTALL_S = 280


def node_modules(recipe: Path) -> Path:
    """A folder with the packages that `recipe`/package-lock.json lists."""
    files = [recipe / "package.json", recipe / "package-lock.json"]
    return _install(recipe.name, files, [["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]])


def virtual_environment(recipe: Path) -> Path:
    """The folder of a virtual environment with what `recipe`/requirements.txt asks for; → its Python is bin/python."""
    make = [sys.executable, "-m", "venv", "."]
    fill = ["bin/python", "-m", "pip", "install", "--quiet", "-r", "requirements.txt"]
    return _install(recipe.name, [recipe / "requirements.txt"], [make, fill])


def _install(name: str, files: Sequence[Path], commands: Sequence[Sequence[str]]) -> Path:
    """A folder of its own for each content of `files`, in which the commands have run beside copies of them. Tests in
    other processes wait; what was left unfinished is begun anew.
    """
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    folder = INSTALLED / f"{name}-{digest}"
    done = folder / ".installed"
    INSTALLED.mkdir(parents=True, exist_ok=True)
    with (INSTALLED / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for file in files:
                shutil.copy(file, folder)
            for command in commands:
                run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S)
                assert run.returncode == 0, f"{' '.join(command)}:\n{run.stdout}{run.stderr}"
            done.touch()
    return folder
