"""`ray up`'s files: Ray's own schema and preparation, the commands as a shell reads them, names that exist."""

import mmap
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import ray
from deployfiles import DEPLOY, ROOT, environment, load
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from octavo.cluster.config import DeploymentConfig

CLUSTERS = sorted((DEPLOY / "ray").glob("*.yaml"))
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
# Made on the machine that runs `ray up`, as the file's first lines say.
MADE_BEFORE = {"~/.ray/auth_token"}
RAY = Path(ray.__file__).parent
each_cluster = pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)


def prepared(path):
    return prepare_config(load(path))


def commands(path):
    config = prepared(path)
    per_type = [kind.get(key, []) for kind in config["available_node_types"].values() for key in COMMANDS]
    return [line for lines in [*(config[key] for key in COMMANDS), *per_type] for line in lines]


def test_there_is_a_file_for_each_way():
    assert [path.name for path in CLUSTERS] == ["aws.yaml", "onpremise.yaml"]


@each_cluster
def test_ray_accepts_it(path):
    validate_config(prepared(path))


def test_ray_prepares_the_hosts_of_the_list():
    config = _bootstrap_config(load(DEPLOY / "ray" / "onpremise.yaml"), no_config_cache=True)
    kind = config["available_node_types"][config["head_node_type"]]
    assert kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"])


def test_aws_has_a_head_without_work_and_two_groups_of_gpus():
    config = prepared(DEPLOY / "ray" / "aws.yaml")
    kinds = config["available_node_types"]
    head = kinds.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert head["max_workers"] == 0
    assert sorted(kind["resources"]["GPU"] for kind in kinds.values()) == [1, 8]
    assert all(kind["min_workers"] < kind["max_workers"] for kind in kinds.values())
    assert sum(kind["max_workers"] for kind in kinds.values()) <= config["max_workers"]


@each_cluster
def test_commands_are_what_a_shell_understands(path):
    for line in commands(path):
        checked = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True)
        assert checked.returncode == 0, f"{line}: {checked.stderr}"


@each_cluster
def test_ray_start_has_the_options(path):
    known = {option for parameter in start.params for option in parameter.opts}
    starts = [line for line in commands(path) if "/ray start" in line]
    assert len(starts) == 2
    for line in starts:
        words = shlex.split(re.sub(r"\$\{\w+:\+(.*)\}", r"\1", line.split("/ray start ", 1)[1]))
        assert {word.partition("=")[0] for word in words} <= known


@each_cluster
def test_what_is_mounted_and_named_exists(path):
    for local in load(path)["file_mounts"].values():
        assert local in MADE_BEFORE or (ROOT / local).exists(), local
    for named in re.findall(r"\boctavo/(deploy/[\w./-]+)", path.read_text()):
        assert (ROOT / named.rstrip(".")).exists(), named
    for line in commands(path):
        if "/ray start" in line:
            assert ". ~/octavo/deploy/ray/cluster.env" in line


def test_one_machine_uses_the_same_settings():
    script = DEPLOY / "ray" / "one-machine.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert script.stat().st_mode & 0o111
    text = script.read_text()
    assert '. "$here/cluster.env"' in text
    known = {option for parameter in start.params for option in parameter.opts}
    (command,) = re.findall(r"exec ray start (.*)", text)
    assert {word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")} <= known


def test_every_variable_means_something_to_ray():
    serve = (RAY / "serve/_private/constants.py").read_text()
    authentication = (RAY / "_private/authentication/authentication_token_setup.py").read_text()
    with (RAY / "core/src/ray/gcs/gcs_server").open("rb") as binary:
        core = mmap.mmap(binary.fileno(), 0, access=mmap.ACCESS_READ)
        for name in environment(DEPLOY / "ray" / "cluster.env"):
            known = f'"{name}"' in serve + authentication or core.find(name.removeprefix("RAY_").encode()) >= 0
            assert known, name


def test_the_environment_fits_together():
    values = environment(DEPLOY / "ray" / "cluster.env")
    connections = int(values["RAY_SERVE_HAPROXY_MAXCONN"])
    for path in CLUSTERS:
        for line in commands(path):
            if limit := re.search(r"ulimit -n (\d+)", line):
                # HAProxy wants two per connection, pipes to splice a quarter of them, and some for itself.
                assert int(limit[1]) > 2.5 * connections + 100
    longest_stream = DeploymentConfig().ingress_drain_timeout_s
    assert int(values["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) >= longest_stream
    script = f"set -a && . {DEPLOY}/ray/cluster.env && env"
    seen = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert {f"{name}={value}" for name, value in values.items()} <= set(seen)
