"""`octavo` as a process: help, refusals before Ray starts, and a server's whole life with nothing left behind."""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from octavo.cluster import machine
from octavo.cluster.config import SERVING_DEFAULTS, Autoscaling, DeploymentConfig, Limits, ModelConfig, Routing
from octavo.cluster.flags import FLAGS, merge
from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError

pytestmark = pytest.mark.live

OCTAVO = [sys.executable, "-m", "octavo.cluster.cli"]
ENV = {**os.environ, "COLUMNS": "160", "NO_COLOR": "1"}
NOTHING = {flag.key: None for flag in FLAGS}


def octavo(*args, timeout=30):
    return subprocess.run([*OCTAVO, *args], capture_output=True, text=True, timeout=timeout, env=ENV, check=False)


def test_every_setting_has_a_flag():
    classes = {"engine": EngineConfig, "limits": Limits, "routing": Routing, "autoscaling": Autoscaling}
    settings = {(section, field.name) for section, cls in classes.items() for field in dataclasses.fields(cls)}
    settings |= {("", field.name) for cls in (DeploymentConfig, ModelConfig) for field in dataclasses.fields(cls)}
    settings -= {("engine", "model"), ("", "models"), *(("", section) for section in classes)}
    assert {(flag.section, flag.name) for flag in FLAGS} == settings


def test_flags_go_before_the_file_and_the_file_before_defaults():
    file = {"model": "a", "num_replicas": 2, "engine": {"block_size": 32, "seed": 5}}
    given = {**NOTHING, "block_size": 64, "max_body_bytes": "1MiB", "enable_prefix_caching": False}
    config = DeploymentConfig.from_mapping(merge(file, given))
    (model,) = config.models
    assert (model.engine.block_size, model.engine.seed, model.engine.model) == (64, 5, "a")
    assert (model.num_replicas, config.limits.max_body_bytes) == (2, 1 << 20)
    assert model.engine.enable_prefix_caching is False
    assert DeploymentConfig.from_mapping(merge({}, NOTHING)).models[0].engine == EngineConfig(**SERVING_DEFAULTS)


def test_flags_of_one_model_do_not_go_with_a_list_of_models():
    file = {"models": [{"model": "a"}, {"model": "b"}]}
    assert merge(file, {**NOTHING, "max_body_bytes": "1MiB"})["limits"] == {"max_body_bytes": "1MiB"}
    with pytest.raises(ConfigError, match="--routing-policy is a setting of one model"):
        merge(file, {**NOTHING, "routing_policy": "round_robin"})


def test_help_is_quick_and_light():
    started = time.perf_counter()
    shown = octavo("serve", "--help")
    assert shown.returncode == 0
    assert time.perf_counter() - started < 3  # 0.3 s on a machine with nothing else to do
    for name in ("--max-model-len", "--kv-cache-memory-bytes", "--served-model-name", "--drain-timeout", "--api-key"):
        assert name in shown.stdout
    heavy = "import sys, octavo.cluster.cli; print({'ray', 'torch', 'transformers', 'fastapi'} & sys.modules.keys())"
    modules = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert modules.stdout.strip() == "set()"


def test_version_and_commands():
    assert re.fullmatch(r"octavo \d+\.\d+.*\n", octavo("version").stdout)
    listed = octavo("--help").stdout
    assert all(command in listed for command in ("serve", "chat", "generate", "version"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["no-such-model-anywhere"], "no-such-model-anywhere"),
        (["fake", "--block-size", "7"], "block_size must be"),
        (["fake", "--dtype", "int3"], "engine.dtype must be one of"),
        (["fake", "--kv-cache-memory-bytes", "lots"], "not a size"),
        (["fake", "--config", "/nowhere.yaml"], "cannot be read"),
        (["fake", "--request-timeout", "0"], "limits.request_timeout_s must be above 0"),
        (["fake", "--address", "127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1"),
        (["fake", "--grpc-port", "8000"], "cannot share port 8000"),
        (["fake", "--address", "somewhere"], "write auto or host:port"),
        (["fake", "--max-num-seqs", "many"], "--max-num-seqs"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(args, said):
    refused = octavo("serve", *args)
    assert refused.returncode == 2
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr
    assert refused.stdout == ""


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = octavo("serve", "fake", "--port", str(taken.getsockname()[1]))
    assert refused.returncode == 2
    assert "address already in use" in refused.stderr


def alive(pids):
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        except OSError:
            continue
        if state != "Z":  # a dead process whose new parent has not yet asked for its status
            found.append((pid, Path(f"/proc/{pid}/comm").read_text().strip()))
    return found


@pytest.fixture
def server(tmp_path):
    """(process, url, log) of a server that has announced itself."""
    port, log = machine.free_ports(1)[0], tmp_path / "log"
    args = ["serve", "fake", "--port", str(port), "--api-key", "key", "--served-model-name", "named"]
    with log.open("w") as out:
        process = subprocess.Popen([*OCTAVO, *args], stdout=out, stderr=out, env=ENV, start_new_session=True)
    deadline = time.monotonic() + 90
    while "Ctrl-C stops" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    yield process, f"http://127.0.0.1:{port}", log
    if process.poll() is None:
        for pid in (*machine._descendants(process.pid), process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def test_a_server_s_life(server):
    process, url, log = server
    said = log.read_text()
    for phase in ("import ray", "start ray", "start serve", "replica", "first token", "total"):
        assert re.search(rf"{phase} +\d+\.\d\d s", said), phase
    assert "curl" in said
    headers = {"Authorization": "Bearer key"}
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/v1/models", headers=headers).json()["data"][0]["id"] == "named"

    children = machine._descendants(process.pid)
    assert len(children) > 5
    body = {"model": "named", "prompt": "x", "max_tokens": 1500, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        streamed = [line for line in lines if line]
    assert streamed[-1] == "data: [DONE]"  # the stream in progress was finished, not cut
    assert '"finish_reason":"length"' in streamed[-2]
    assert process.wait(timeout=30) == 0
    assert "Traceback" not in log.read_text()
    assert alive(children) == []
