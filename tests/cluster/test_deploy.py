"""`octavo deploy`: what would change, what is refused, and live: a rolling deployment under load that nobody notices,
one that fails and is put back, `octavo status` meanwhile and without Serve's controller.
"""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import httpx
import pytest
import ray
from fakes import INFO, fake_replica, local_client
from ray.cluster_utils import Cluster
from rich.console import Console

from octavo.cluster.app import engine_name
from octavo.cluster.config import DeploymentConfig
from octavo.cluster.deploy import is_up, plan, progress
from octavo.cluster.machine import free_ports
from octavo.cluster.overview import CONTROLLER, Deployment, Overview, Replica, look
from octavo.cluster.rollout import compare
from octavo.cluster.rollout_checks import check, check_here, own_part, read_deployment
from octavo.cluster.routing import client as routing_client
from octavo.engine.errors import ConfigError

pytestmark = pytest.mark.live

LONG, SHORT = 3500, 20


def config(**values):
    return DeploymentConfig.from_mapping({"model": "fake", **values})


def kinds(before, after):
    return {change.deployment: change.kind for change in compare(before, after, engine_name)}


@pytest.mark.parametrize(
    ("before", "after", "ingress", "engine"),
    [
        ({}, {}, "unchanged", "unchanged"),
        ({}, {"num_replicas": 3}, "unchanged", "in place"),
        ({}, {"autoscaling": {"max_replicas": 3}}, "unchanged", "in place"),
        ({}, {"max_surge_percent": 0}, "unchanged", "in place"),
        ({}, {"num_ingresses": 2}, "in place", "unchanged"),
        ({}, {"num_cpus": 2}, "unchanged", "restart"),
        ({}, {"engine": {"block_size": 32}}, "restart", "restart"),
        ({}, {"drain_timeout_s": 9}, "restart", "restart"),
        ({}, {"routing": {"policy": "round_robin"}}, "restart", "in place"),
        ({}, {"chat_template": "{{ messages }}"}, "restart", "in place"),
        ({}, {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}, "restart", "in place"),
        ({}, {"api_key": ["k"]}, "restart", "unchanged"),
        ({}, {"limits": {"max_choices": 2}}, "restart", "unchanged"),
        ({}, {"log_level": "debug"}, "restart", "restart"),
    ],
)
def test_what_restarts_and_what_changes_in_place(before, after, ingress, engine):
    assert kinds(config(**before), config(**after)) == {"ingress": ingress, "engine-fake": engine}
    assert kinds(config(**after), config(**after)) == {"ingress": "unchanged", "engine-fake": "unchanged"}


def test_models_come_and_go():
    after = DeploymentConfig.from_mapping({"models": [{"model": "fake", "served_model_name": "b"}]})
    assert kinds(config(), after) == {"ingress": "restart", "engine-b": "new", "engine-fake": "removed"}
    assert kinds(None, after) == {"ingress": "new", "engine-b": "new"}


def test_the_plan_names_settings_but_no_secrets():
    changes = compare(config(api_key=["one"]), config(api_key=["secret"], engine={"block_size": 32}), engine_name)
    console = Console(file=io.StringIO(), width=80)
    console.print(plan(changes))
    text = console.file.getvalue()
    assert "engine.block_size: 16 → 32" in text
    assert "secret" not in text
    assert "restarts, replica by replica" in text


def test_a_serve_config_contains_one(tmp_path):
    ours = {"import_path": "octavo.cluster.app:build_app", "args": {"model": "fake", "num_replicas": 2}}
    assert own_part({"applications": [{"import_path": "x:y"}, ours]}, "f") == ours["args"]
    with pytest.raises(ConfigError, match="it holds 0"):
        own_part({"applications": [{"import_path": "x:y"}]}, "f")
    with pytest.raises(ConfigError, match="it holds 0"):
        own_part({"applications": None}, "f")
    file = tmp_path / "serve.yaml"
    file.write_text(json.dumps({"applications": [ours]}))
    assert read_deployment(file).models[0].num_replicas == 2


def test_a_model_is_looked_at_before_it_is_deployed(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8})
    )

    def said(**engine):
        return check_here(DeploymentConfig.from_mapping({"model": str(tmp_path), "engine": engine}).models[0])

    assert said(tensor_parallel_size=2) is None
    assert "the model has 2 layers" in said(pipeline_parallel_size=3)
    (missing,) = DeploymentConfig.from_mapping({"model": "/nowhere/at/all"}).models
    assert check_here(missing) == "/nowhere/at/all cannot be read: no such file or directory"


def overview(*replicas, status="DEPLOYING", wanted=2):
    made = tuple(Replica(name, "engine-m", state) for name, state in replicas)
    return Overview(0.0, status, deployments=(Deployment("engine-m", "UPDATING", "", wanted),), replicas=made)


def test_when_it_is_up_and_what_is_said_until_then():
    old, wanted = {"a", "b"}, {"engine-m": 2}
    first = overview(("a", "RUNNING"), ("b", "RUNNING"), ("c", "STARTING"))
    assert not is_up(first, wanted, old)
    assert progress(first, old) == "engine-m: 0 of 2 up, 2 old, 1 starting"
    then = overview(("b", "RUNNING"), ("c", "RUNNING"), ("a", "STOPPING"))
    assert not is_up(then, wanted, old)
    assert progress(then, old) == "engine-m: 1 of 2 up, 1 old, 1 draining"
    assert is_up(overview(("c", "RUNNING"), ("d", "RUNNING"), ("b", "STOPPING")), wanted, old)
    assert not is_up(overview(("c", "RUNNING"), wanted=2), wanted, old)
    assert not is_up(overview(("c", "RUNNING"), ("d", "RUNNING"), ("e", "STARTING")), wanted, old)
    assert not is_up(overview(status="DEPLOYING", wanted=1), wanted, old)
    assert not is_up(replace(first, app_status="RUNNING"), wanted, old)
    assert is_up(overview(("c", "RUNNING"), ("d", "RUNNING"), status="RUNNING"), wanted, old)
    assert not is_up(overview(("c", "RUNNING"), ("d", "RUNNING"), status="DEPLOY_FAILED"), wanted, old)
    before_serve_knows = overview(("c", "RUNNING"), status="RUNNING", wanted=1)
    assert not is_up(before_serve_knows, wanted, old)
    assert is_up(before_serve_knows, {"engine-m": None}, old)
    assert not is_up(before_serve_knows, {"engine-m": 1, "engine-new": 1}, old)


async def test_an_ingress_learns_what_its_engines_have_become(monkeypatch):
    replica = fake_replica()
    client, receiver = await local_client(replica)
    assert (await client.info()).max_model_len == INFO.max_model_len
    replica._info = replace(INFO, max_model_len=99)
    assert (await client.info()).max_model_len == INFO.max_model_len  # not asked at every request
    monkeypatch.setattr(routing_client, "INFO_S", 0.0)
    await client.info()
    deadline = time.monotonic() + 5
    while (await client.info()).max_model_len != 99:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    await receiver.stop()
    await replica.close()


class Cluster1:
    """A cluster of one node, and the command line as its operator."""

    def __init__(self, folder):
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
        self.folder = folder
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}/v1/completions"

    def start(self, *args):
        command = [sys.executable, "-m", "octavo.cluster.cli", *args, "--address", self.cluster.address]
        env = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    def run(self, *args):
        """(exit code, everything it printed)."""
        process = self.start(*args)
        out, err = process.communicate(timeout=90)
        return process.returncode, out + err

    def deploy(self, *args, **values):
        file = self.folder / "deployment.yaml"
        base = {"model": "fake", "num_replicas": 2, "num_cpus": 0.5, "drain_timeout_s": 20}
        file.write_text(json.dumps({**base, **values}))
        return self.run("deploy", str(file), "--host", "127.0.0.1", "--port", str(self.port), *args)


@pytest.fixture(scope="module")
def operator(tmp_path_factory):
    made = Cluster1(tmp_path_factory.mktemp("deploy"))
    code, said = made.deploy()
    assert code == 0, said
    ray.init(address=made.cluster.address, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.cluster.shutdown()


def running(deployment="engine-fake"):
    """Ids of the replicas that run."""
    return {r.id for r in look("octavo").replicas if r.deployment == deployment and r.state == "RUNNING"}


def body(num_tokens, stream=False):
    prompt = {"model": "fake", "prompt": "Once upon a time", "temperature": 0}
    return {**prompt, "max_tokens": num_tokens, "ignore_eos": True, "stream": stream}


def answer(http, url, num_tokens):
    response = http.post(url, json=body(num_tokens))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def streamed(http, url, num_tokens):
    """The text of a stream that came to its end."""
    text, lines = "", []
    with http.stream("POST", url, json=body(num_tokens, stream=True)) as response:
        for line in response.iter_lines():
            if line:
                lines.append(line)
            if line.startswith("data: {"):
                choices = json.loads(line.removeprefix("data: "))["choices"]
                text += choices[0]["text"] if choices else ""
    assert lines[-1] == "data: [DONE]", lines[-1]
    return text


class Load:
    """Clients that ask again and again, and compare each answer with the first."""

    def __init__(self, url):
        self.url, self.wrong, self.done = url, [], {SHORT: 0, LONG: 0}
        with httpx.Client(timeout=60) as http:
            self.wanted = {n: answer(http, url, n) for n in (SHORT, LONG)}
        self._stop = threading.Event()
        asks = [(answer, SHORT)] * 2 + [(streamed, LONG)] * 3
        self._threads = [threading.Thread(target=self._ask, args=ask) for ask in asks]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, ask, num_tokens):
        while not self._stop.is_set():
            try:
                with httpx.Client(timeout=60) as http:
                    text = ask(http, self.url, num_tokens)
                if text != self.wanted[num_tokens]:
                    self.wrong.append((num_tokens, len(text)))
                self.done[num_tokens] += 1
            except Exception as error:
                self.wrong.append((num_tokens, repr(error)))
            time.sleep(0.05)


def test_a_rolling_deployment_under_load(operator):
    before, ingress = running(), running("ingress")
    assert len(before) == 2
    with Load(operator.url) as load:
        time.sleep(2)
        code, said = operator.deploy(engine={"block_size": 32})
        time.sleep(2)
    assert code == 0, said
    assert "engine.block_size: 16 → 32" in said
    assert "2 old" in said
    assert "It runs" in said
    assert load.wrong == []
    assert load.done[SHORT] > 20
    assert load.done[LONG] >= 3
    assert len(running() - before) == 2
    assert not running() & before
    assert not running("ingress") & ingress


def test_what_changes_in_place_restarts_nothing(operator):
    before = running()
    code, said = operator.deploy(engine={"block_size": 32}, num_replicas=1)
    assert (code, "changes in place" in said, "restarts" in said) == (0, True, False), said
    code, said = operator.deploy("--dry-run", engine={"block_size": 32}, num_replicas=1)
    assert said.count("stays as it is") == 2, said
    code, said = operator.deploy(engine={"block_size": 32})
    assert "num_replicas: 1 → 2" in said
    assert code == 0
    assert len(running()) == 2
    assert running() & before


def test_one_that_cannot_run_is_put_back(operator, tmp_path):
    before = running()
    with pytest.raises(ConfigError, match="need 9 CPUs, but the cluster has 4"):
        check(config(num_replicas=9))
    with pytest.raises(ConfigError, match="Unknown model 'nothing'"):
        check(config(model="nothing"))
    code, said = operator.deploy(model=str(tmp_path / "nothing"))
    assert code == 2
    assert "no such file or directory, on any node." in said
    (tmp_path / "config.json").write_text("{}")
    code, said = operator.deploy(model=str(tmp_path), served_model_name=["fake"])
    assert code == 1, said
    assert "Failed: " in said
    assert "holds no weights" in said
    assert said.rstrip().endswith("It runs.")
    assert running() == before
    assert httpx.post(operator.url, json=body(SHORT), timeout=30).status_code == 200


def test_status_without_the_controller_and_until_ctrl_c(operator):
    watching = operator.start("status", "--watch", "--interval", "0.5")
    time.sleep(4)
    ray.kill(ray.get_actor(CONTROLLER, namespace="serve"), no_restart=True)
    code, said = operator.run("status")
    assert code == 1
    assert "nothing is replaced or scaled until it is back" in said
    assert said.count("THERE") == 3  # the replicas, which the controller does not vouch for
    watching.send_signal(signal.SIGINT)
    out, err = watching.communicate(timeout=10)
    assert watching.returncode == 0
    assert "until it is back" in out  # the last of what it showed
    assert "Traceback" not in out + err
    assert httpx.post(operator.url, json=body(SHORT), timeout=30).status_code == 200
