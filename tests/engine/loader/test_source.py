"""Names of models: local ones, presets, and hub ids against a small hub of our own on 127.0.0.1.

huggingface_hub reads its environment when it is imported, so what concerns the hub runs in a fresh process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from octavo.engine.errors import ConfigError
from octavo.engine.loader import hub, package, source
from octavo.engine.loader.presets import HubRepo, PackageMember, Preset
from octavo.engine.loader.source import ModelSource, resolve_model

# --- local names ---


def test_local_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "also.gguf").write_bytes(b"")
    assert resolve_model(str(folder)) == ModelSource("folder", folder, "my-model", "my-model")


def test_local_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.Q4_0.gguf"
    path.write_bytes(b"")
    expected = ModelSource("gguf", path, "tiny.Q4_0", "tiny.Q4_0")
    assert resolve_model(str(path)) == expected
    assert resolve_model(str(tmp_path)) == expected  # a folder with nothing else
    monkeypatch.chdir(tmp_path)
    assert resolve_model("tiny.Q4_0.gguf") == expected
    (tmp_path / "tiny.Q8_0.gguf").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"several GGUF files: .*tiny\.Q4_0\.gguf, tiny\.Q8_0\.gguf"):
        resolve_model(str(tmp_path))


def test_local_names_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match="neither a model folder"):
        resolve_model(str(tmp_path / "notes.txt"))
    with pytest.raises(ConfigError, match="no file or folder"):
        resolve_model(str(tmp_path / "absent"))


@pytest.mark.parametrize("name", ["smollm2", "a/b/c", "a b/c", ""])
def test_unknown_name_lists_what_there_is(name: str) -> None:
    if name == "":
        name = "nothing here"
    with pytest.raises(ConfigError, match=r"Unknown model.*\.gguf file.*organisation/name.*presets .*smollm2-135m"):
        resolve_model(name)


# --- presets ---

HUB = HubRepo("org/model")
PACKAGE = PackageMember("pkg==1.0", "pkg/model.gguf", "ab" * 32)
PRESET = Preset("tiny", "tiny-served", (HUB, PACKAGE))


@dataclass
class Places:
    """What is cached, and what a fetch brings; every call is noted."""

    cached: set[str] = field(default_factory=set)
    reachable: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    state = Places()

    def fetch(name: str, error: type[ConfigError]) -> Any:
        def run(*arguments: object) -> Path:
            state.calls.append(name)
            if name not in state.reachable:
                raise error(f"no {name} here")
            return tmp_path / name

        return run

    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    monkeypatch.setattr(source, "load_presets", lambda: {"tiny": PRESET})
    monkeypatch.setattr(hub, "cached", lambda *_: tmp_path / "hub" if "hub" in state.cached else None)
    monkeypatch.setattr(hub, "fetch", fetch("hub", hub.HubUnreachable))
    monkeypatch.setattr(package, "is_cached", lambda *_: "package" in state.cached)
    monkeypatch.setattr(package, "fetch", fetch("package", ConfigError))
    return state


def test_a_cached_source_needs_no_network(places: Places, tmp_path: Path) -> None:
    places.cached = {"package"}
    path = tmp_path / "models" / "tiny" / "model.gguf"
    assert resolve_model("tiny") == ModelSource("gguf", path, "tiny", "tiny-served")
    places.cached = {"package", "hub"}
    assert resolve_model("tiny") == ModelSource("folder", tmp_path / "hub", "tiny", "tiny-served")
    assert places.calls == []


def test_sources_are_tried_in_order(places: Places) -> None:
    places.reachable = {"package", "hub"}
    assert resolve_model("tiny").kind == "folder"
    assert places.calls == ["hub"]
    places.reachable = {"package"}
    assert resolve_model("tiny").kind == "gguf"
    assert places.calls == ["hub", "hub", "package"]


def test_no_source_can_be_had(places: Places) -> None:
    with pytest.raises(
        ConfigError, match=r"none of its sources \(org/model: no hub here; pkg==1\.0: no package here\)"
    ):
        resolve_model("tiny")


def test_a_preset_takes_no_revision(places: Places) -> None:
    with pytest.raises(ConfigError, match="its own revision"):
        resolve_model("tiny", revision="v2")


# --- the hub ---

SHARD = b"s" * 5000
REPOS = {
    "org/model": {
        "config.json": b"{}",
        "generation_config.json": b"[1]",
        "tokenizer.json": b"[2]",
        "chat_template.jinja": b"x",
        "model-00001-of-00001.safetensors": SHARD,
        "model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00001.safetensors"}}',
        "pytorch_model.bin": b"unwanted",
        "consolidated.safetensors": b"unwanted",
        "onnx/model.onnx": b"unwanted",
        "README.md": b"unwanted",
    },
    "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"p", "training_args.bin": b"unwanted"},
    "org/ggufs": {"a.Q4_0.gguf": b"GGUF4", "a.Q8_0.gguf": b"GGUF8"},
}
GATED = "org/gated"


def commit_of(repo: str) -> str:
    return hashlib.sha1(repo.encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The few parts of the hub's API that a download needs."""

    log: list[str]

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.split("?")[0]
        self.log.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repo, listing, revision = match.groups()
            if repo == GATED:
                return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
            if repo not in REPOS:
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
            if revision not in (None, "main", commit_of(repo)):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            files = REPOS[repo]
            if listing == "tree":
                found: Any = [self.entry(name, data) for name, data in files.items()]
            else:
                siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                found = {"id": repo, "sha": commit_of(repo), "siblings": siblings}
            return self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            repo, name = match.groups()
            data = REPOS[repo][name]
            headers = {"ETag": f'"{self.entry(name, data)["oid"]}"', "X-Repo-Commit": commit_of(repo)}
            return self.answer(200, data, headers, body)
        return self.answer(404, b"{}", {}, body)

    @staticmethod
    def entry(name: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def answer(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@dataclass
class HubServer:
    url: str
    log: list[str]


@pytest.fixture
def server() -> Iterator[HubServer]:
    log: list[str] = []
    served = ThreadingHTTPServer(("127.0.0.1", 0), type("LoggedHub", (Hub,), {"log": log}))
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield HubServer(f"http://127.0.0.1:{served.server_port}", log)
    served.shutdown()
    served.server_close()
    thread.join()


SCRIPT = """
import json, sys, time
from octavo.engine.errors import ConfigError
from octavo.engine.loader.source import resolve_model

class Sum:
    total = seen = 0
    def start(self, total_bytes, description): self.total = total_bytes
    def advance(self, num_bytes): self.seen += num_bytes
    def done(self): pass

import huggingface_hub
for name, options in json.loads(sys.argv[1]):
    progress, started = Sum(), time.monotonic()
    try:
        found = resolve_model(name, progress=progress, **options)
        answer = {"path": str(found.path), "kind": found.kind, "name": found.served_model_name}
    except ConfigError as error:
        answer = {"error": str(error)}
    answer |= {"seconds": time.monotonic() - started, "total": progress.total, "seen": progress.seen}
    print(json.dumps(answer))
"""


def resolve(home: Path, url: str, *names: Any, **env: str) -> list[dict[str, Any]]:
    """resolve_model in a fresh process, for each name or (name, options)."""
    asked = [(name, {}) if isinstance(name, str) else name for name in names]
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", **env}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(asked)],
        env={**kept, **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_download_then_offline(server: HubServer, tmp_path: Path) -> None:
    (found,) = resolve(tmp_path, server.url, "org/model")
    folder = Path(found["path"])
    assert (found["kind"], found["name"]) == ("folder", "org/model")
    unwanted = {name for name, data in REPOS["org/model"].items() if data == b"unwanted"}
    assert {path.name for path in folder.iterdir()} == set(REPOS["org/model"]) - unwanted
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == SHARD
    assert found["total"] == found["seen"] > len(SHARD)

    asked = len(server.log)
    (offline,) = resolve(tmp_path, server.url, "org/model", HF_HUB_OFFLINE="1")
    assert offline["path"] == found["path"]
    assert len(server.log) == asked
    commit = ("org/model", {"revision": commit_of("org/model")})
    again, pinned = resolve(tmp_path, server.url, "org/model", commit)
    assert again["path"] == pinned["path"] == found["path"]
    assert not [line for line in server.log[asked:] if "/resolve/" in line]  # nothing is downloaded twice
    assert sum(line.startswith("GET /api/models/org/model") for line in server.log[asked:]) <= 2

    refused, unknown = resolve(tmp_path, "http://127.0.0.1:1", "org/model", "org/pickled")
    assert refused["path"] == found["path"]
    assert "not in the local cache" in unknown["error"]


def test_a_broken_off_download_is_not_taken_for_a_model(server: HubServer, tmp_path: Path) -> None:
    (found,) = resolve(tmp_path, server.url, "org/model")
    (Path(found["path"]) / "model-00001-of-00001.safetensors").unlink()
    (offline,) = resolve(tmp_path, server.url, "org/model", HF_HUB_OFFLINE="1")
    assert "not in the local cache" in offline["error"]
    (mended,) = resolve(tmp_path, server.url, "org/model")
    assert (Path(mended["path"]) / "model-00001-of-00001.safetensors").read_bytes() == SHARD


def test_hub_forms_and_errors(server: HubServer, tmp_path: Path) -> None:
    answers = resolve(
        tmp_path,
        server.url,
        "org/pickled",
        "org/ggufs/a.Q8_0.gguf",
        "org/ggufs",
        "org/ggufs/b.gguf",
        "org/absent",
        GATED,
        ("org/model", {"revision": "v9"}),
        ("org/ggufs/a.Q4_0.gguf", {"download_dir": str(tmp_path / "elsewhere")}),
    )
    pickled, gguf, ggufs, no_file, absent, gated, revision, elsewhere = answers
    assert {path.name for path in Path(pickled["path"]).iterdir()} == {"config.json", "pytorch_model.bin"}
    assert gguf["kind"] == "gguf"
    assert Path(gguf["path"]).read_bytes() == b"GGUF8"
    assert "as in org/ggufs/a.Q4_0.gguf" in ggufs["error"]
    assert "no file 'b.gguf'" in no_file["error"]
    assert "no model org/absent" in absent["error"]
    assert "gated: accept its terms" in gated["error"]
    assert "no revision 'v9'" in revision["error"]
    assert Path(elsewhere["path"]).is_relative_to(tmp_path / "elsewhere")


def test_a_hub_that_does_not_answer_costs_two_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (answer,) = resolve(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}", "org/model")
    assert "cannot be asked" in answer["error"]
    assert answer["seconds"] < 4.0  # two, and a slow machine


def test_slow_name_resolution_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(hub, "PROBE_DEADLINE_S", 0.2)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: time.sleep(3))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    started = time.monotonic()
    with pytest.raises(hub.HubUnreachable, match="did not answer"):
        hub._ask(HUB)
    assert time.monotonic() - started < 2


def test_names_need_no_torch() -> None:
    code = "import sys, octavo.engine.loader.source; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
