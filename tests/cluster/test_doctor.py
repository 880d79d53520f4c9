"""`octavo doctor`: every failure injected and the node named; and a real cluster, whole and with a node that hangs."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from rich.console import Console

from octavo.cluster.capacity import NodeResources, shortage
from octavo.cluster.config import DeploymentConfig
from octavo.cluster.doctor import here, links, report
from octavo.cluster.doctor.collective import Seats, time_all_reduce
from octavo.cluster.doctor.facts import (
    Collective,
    Disk,
    Gpu,
    Interface,
    Link,
    ModelFiles,
    Node,
    NodeFacts,
    Port,
    Survey,
)
from octavo.cluster.doctor.judge import judge
from octavo.cluster.doctor.verdicts import GIB, Verdict
from octavo.cluster.machine import free_ports
from octavo.engine.parallel.connect import HostedRendezvous

pytestmark = pytest.mark.live

VERSIONS = (("python", "3.11.7"), ("octavo", "0.1.0"), ("ray", "2.60.0"), ("torch", "2.13.0"), ("transformers", "5"))
IDS = ("a" * 56, "b" * 56, "c" * 56)
MODEL = ModelFiles("/models/m", 3, 5 * GIB, "d1")


def node(i, **changes):
    facts = {name: changes.pop(name) for name in list(changes) if name in NodeFacts.__dataclass_fields__}
    given = NodeFacts(
        hostname=f"host-{i}",
        machine=f"boot-{i}",
        interfaces=(
            Interface("lo", "127.0.0.1"),
            Interface("eth0", f"10.0.0.{i}"),
            Interface("docker0", f"172.17.0.{i}"),
        ),
        versions=VERSIONS,
        gpus=(Gpu(0, "H100", "570", 80 * GIB, 80 * GIB),),
        kernels=("avx512", "base"),
        nofile=1 << 20,
        shm=8 * GIB,
        disks=(Disk("models", "/cache", 100 * GIB, 50 * GIB),),
        ports=(Port("HTTP", 8000, True),),
        models=(MODEL,),
    )
    return replace(
        Node(IDS[i], f"host-{i}", f"10.0.0.{i}", is_head=i == 0, gpus=1.0, cpus=8.0, facts=replace(given, **facts)),
        **changes,
    )


def survey(*changed, links=None, **rest):
    """A healthy cluster of three but for the given nodes."""
    nodes = {made.id: made for made in (*map(node, range(3)), *changed)}
    if links is None:
        links = {}
    whole = tuple(
        links.get((i, j), Link(IDS[i], IDS[j], f"10.0.0.{i}", 0.0002, 0.00001))
        for i in range(3)
        for j in range(3)
        if i != j and nodes[IDS[i]].facts is not None and nodes[IDS[j]].facts is not None
    )
    given = {"collectives": (Collective("gloo", 3, 1 << 20, 0.001),), "has_config": True, **rest}
    return Survey(tuple(nodes.values()), whole, **given)


def broken(i, j, error="connection refused"):
    return {(i, j): Link(IDS[i], IDS[j], error=error)}


def found(given):
    return [(check.name, finding) for check in judge(given) for finding in check.findings]


def test_a_healthy_cluster_has_nothing_to_say():
    assert found(survey()) == []
    assert len(judge(survey())) == 12
    assert all(check.summary for check in judge(survey()))
    assert report.passed(judge(survey()))


LOST = replace(node(2), facts=None, lost="health check failed")
SILENT = replace(node(2), facts=None, trouble="it did not answer within 20 s")
WITHOUT = replace(node(2), facts=None, trouble="ModuleNotFoundError: No module named 'octavo'")


@pytest.mark.parametrize(
    ("given", "check", "verdict", "said"),
    [
        (survey(SILENT), "nodes", "FAIL", "host-2 (10.0.0.2) does not answer: it did not answer within 20 s."),
        (survey(WITHOUT), "nodes", "FAIL", "No module named 'octavo'"),
        (survey(LOST), "nodes", "WARN", "host-2 (10.0.0.2) was lost: health check failed."),
        (survey(node(1, address="127.0.0.1")), "addresses", "FAIL", "host-1 (127.0.0.1) is known as 127.0.0.1"),
        (survey(node(1, address="172.17.0.1")), "addresses", "WARN", "its virtual interface docker0"),
        (survey(node(1, address="54.1.2.3")), "addresses", "WARN", "no address of its interfaces (eth0 10.0.0.1"),
        (survey(links=broken(0, 2)), "links", "FAIL", "host-0 (10.0.0.0) cannot reach host-2 (10.0.0.2): connection"),
        (
            survey(links=broken(0, 2) | broken(1, 2)),
            "links",
            "FAIL",
            "host-2 (10.0.0.2) is not reached by any other node",
        ),
        (survey(links=broken(2, 0) | broken(2, 1)), "links", "FAIL", "host-2 (10.0.0.2) cannot reach any other node"),
        (
            survey(links=broken(2, 0) | broken(2, 1) | broken(0, 2) | broken(1, 2)),
            "links",
            "FAIL",
            "host-2 (10.0.0.2) is neither reached by the others nor reaches them",
        ),
        (
            survey(links={(1, 2): Link(IDS[1], IDS[2], "172.17.0.1", 0.001)}),
            "links",
            "WARN",
            "host-1 (10.0.0.1) reaches host-2 (10.0.0.2) through docker0",
        ),
        (
            survey(links={(1, 2): Link(IDS[1], IDS[2], "10.0.0.1", 0.04)}),
            "links",
            "WARN",
            "host-1 (10.0.0.1) waits 40.0 ms for an answer of host-2 (10.0.0.2)",
        ),
        (
            survey(links={(0, 1): Link(IDS[0], IDS[1], "10.0.0.0", 1e-4, 3.0)}),
            "clocks",
            "WARN",
            "host-1 (10.0.0.1) has a clock 3.0 s ahead of that of host-0 (10.0.0.0)",
        ),
        (
            survey(links={(2, 0): Link(IDS[2], IDS[0], "10.0.0.2", 1e-4, 90.0)}),
            "clocks",
            "FAIL",
            "host-2 (10.0.0.2) has a clock 90.0 s behind",
        ),
        (
            survey(collectives=(Collective("gloo", 3, errors=((IDS[1], "Connection closed by peer"),)),)),
            "all-reduce",
            "FAIL",
            "host-1 (10.0.0.1): the gloo all-reduce failed: Connection closed by peer.",
        ),
        (
            survey(collectives=(Collective("nccl", skipped="the GPUs of 1 of 3 nodes are in use"),)),
            "all-reduce",
            "WARN",
            "nccl was not tried",
        ),
        (
            survey(node(1, versions=(("python", "3.12.1"), *VERSIONS[1:]))),
            "versions",
            "FAIL",
            "host-1 (10.0.0.1) has python 3.12.1, host-0 (10.0.0.0) has 3.11.7",
        ),
        (survey(node(1, versions=(("python", "3.11.9"), *VERSIONS[1:]))), "versions", "WARN", "has python 3.11.9"),
        (survey(node(2, versions=(*VERSIONS[:3], ("torch", None), VERSIONS[4]))), "versions", "FAIL", "lacks torch"),
        (
            survey(node(2, ports=(Port("HTTP", 8000, False),))),
            "ports",
            "FAIL",
            "host-2 (10.0.0.2) has another program on port 8000 (HTTP)",
        ),
        (
            survey(node(2, models=(ModelFiles("/models/m", error="no such file or directory"),))),
            "model files",
            "FAIL",
            "host-2 (10.0.0.2) cannot read /models/m: no such file or directory",
        ),
        (
            survey(node(2, models=(replace(MODEL, digest="d2"),))),
            "model files",
            "FAIL",
            "host-2 (10.0.0.2) has other files in /models/m than host-0",
        ),
        (survey(shortage="The replicas need 8 GPUs."), "capacity", "FAIL", "The replicas need 8 GPUs."),
        (
            survey(node(1, gpus=(Gpu(0, "H100", "550", 1, 1),))),
            "GPUs",
            "WARN",
            "host-1 (10.0.0.1) has NVIDIA driver 550, most have 570",
        ),
        (survey(node(1, nofile=1024)), "limits", "FAIL", "host-1 (10.0.0.1) allows 1024 open files"),
        (survey(node(1, nofile=20000)), "limits", "WARN", "allows 20000 open files"),
        (survey(node(1, shm=64 << 20)), "limits", "FAIL", "host-1 (10.0.0.1) has 64 MiB of /dev/shm"),
        (survey(node(1, shm=None)), "limits", "FAIL", "has no /dev/shm"),
        (survey(node(1, shm=GIB)), "limits", "WARN", "has 1,024 MiB of /dev/shm"),
        (
            survey(node(1, disks=(Disk("Ray's files", "/tmp", 100 * GIB, 3 * GIB),))),
            "limits",
            "FAIL",
            "host-1 (10.0.0.1) has 3.0 GiB (3%) free for Ray's files (/tmp)",
        ),
        (survey(node(1, disks=(Disk("x", "/tmp", 100 * GIB, 8 * GIB),))), "limits", "WARN", "(8%) free"),
        (survey(node(1, kernels=())), "CPU kernels", "WARN", "host-1 (10.0.0.1) has no native CPU kernels"),
        (survey(node(1, kernels=("avx2",))), "CPU kernels", "WARN", "computes with avx2, most with avx512"),
    ],
)
def test_what_is_wrong_is_said_of_the_node_that_is(given, check, verdict, said):
    told = found(given)
    assert [name for name, _ in told] == [check]
    ((_, finding),) = told
    assert said in finding.text
    assert finding.verdict is Verdict[verdict]
    assert finding.advice
    assert report.passed(judge(given)) == (verdict != "FAIL")


@pytest.mark.parametrize(
    ("told", "seen", "verdict", "said"),
    [
        (8, 7, Verdict.FAIL, "host-1 (10.0.0.1) told Ray of 8 GPUs, but nvidia-smi sees 7"),
        (4, 8, Verdict.WARN, "host-1 (10.0.0.1) has 8 GPUs, but told Ray of 4"),
        (8, 8, None, ""),
        (0, 0, None, ""),
    ],
)
def test_gpus_told_and_seen(told, seen, verdict, said):
    gpus = tuple(Gpu(i, "H100", "570", 1, 1) for i in range(seen))
    findings = [finding for _, finding in found(survey(replace(node(1, gpus=gpus), gpus=float(told))))]
    assert [finding.verdict for finding in findings] == ([] if verdict is None else [verdict])
    assert all(said in finding.text for finding in findings)


def test_several_nodes_of_one_machine():
    """They share loopback and GPUs, and their names need their ids."""
    nodes = [
        replace(node(i, machine="one", hostname="h"), name="h", address="127.0.0.1", gpus=0.0 if i else 1.0)
        for i in range(3)
    ]
    assert found(survey(*nodes)) == []
    given = survey(*nodes[:2], replace(nodes[2], facts=None, trouble="it is gone"))
    ((_, finding),) = found(given)
    assert finding.text == "h (127.0.0.1) cccccc does not answer: it is gone."


def test_ports_that_serve_itself_holds_are_no_fault():
    assert found(survey(node(2, ports=(Port("HTTP", 8000, False),)), serving=True)) == []


def test_no_node_answers():
    given = survey(*(replace(node(i), facts=None, trouble="silence") for i in range(3)))
    assert [check.name for check in judge(given)] == ["nodes"]
    assert len(found(given)) == 3


def test_what_was_not_asked_is_not_answered():
    names = [check.name for check in judge(survey(has_config=False))]
    assert "model files" not in names
    assert "capacity" not in names


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(width):
    given = survey(SILENT, node(1, nofile=1024))
    console = Console(width=width, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    report.show(console, given, judge(given), 1.5)
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= width
    assert "FAIL  nodes" in shown
    assert "2 failed" in shown
    told = json.loads(report.as_json(given, judge(given)))
    assert told["ok"] is False
    assert {check["name"]: check["verdict"] for check in told["checks"]}["nodes"] == "fail"
    assert told["nodes"][1]["facts"]["nofile"] == 1024


def test_links_are_measured():
    echo = links.Echo()
    try:
        (good,) = links.measure("a", [links.Peer("b", "127.0.0.1", echo.port)], 2.0)
    finally:
        echo.close()
    assert good.error is None
    assert good.local_address == "127.0.0.1"
    assert 0 < good.round_trip_s < 1
    assert abs(good.clock_ahead_s) <= good.round_trip_s / 2 + 1e-3


def test_a_peer_that_refuses_hangs_or_is_somebody_else():
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            connection, _ = other.accept()
            with connection:
                connection.recv(64)
                connection.sendall(b"HTTP/1.1 400 Bad Request")
                connection.recv(1)

        threading.Thread(target=answer, daemon=True).start()
        (closed,) = free_ports(1)
        ports = (closed, silent.getsockname()[1], other.getsockname()[1])
        peers = [links.Peer("b", "127.0.0.1", port) for port in ports]
        refused, hung, wrong = links.measure("a", peers, 0.5)
    assert refused.error == "connection refused"
    assert hung.error == "no answer within 0.5 s"
    assert wrong.error == "somebody else answers at that address"


def test_all_reduce_of_two_ranks_and_of_one_that_waits_in_vain():
    hosted = HostedRendezvous("127.0.0.1")
    seconds, error = time_all_reduce(Seats((0, 1), 2, "127.0.0.1", hosted.rendezvous.port, 5.0))
    assert error is None
    assert 0 < seconds < 5
    _, error = time_all_reduce(Seats((0,), 2, "127.0.0.1", hosted.rendezvous.port, 0.5))
    assert "not complete within 0.5 s" in error


def test_model_files(tmp_path):
    for name, folder in (("a", tmp_path / "one"), ("a", tmp_path / "two")):
        folder.mkdir()
        (folder / name).write_bytes(b"123")
    one, two = here.model_files(str(tmp_path / "one")), here.model_files(str(tmp_path / "two"))
    assert (one.error, one.num_files, one.size, one.digest) == (None, 1, 3, two.digest)
    (tmp_path / "two" / "a").write_bytes(b"1234")
    assert here.model_files(str(tmp_path / "two")).digest != one.digest
    assert here.model_files(str(tmp_path / "none")).error == "no such file or directory"
    dangling = tmp_path / "one" / "b"
    dangling.symlink_to("/proc/self/mem")  # lists, but cannot be read
    assert here.model_files(str(tmp_path / "one")).error


def test_what_this_machine_says():
    with socket.create_server(("", 0)) as taken:
        (free,) = free_ports(1)
        facts = here.gather(here.Wanted((("HTTP", taken.getsockname()[1]), ("gRPC", free)), ()))
    assert [port.free for port in facts.ports] == [False, True]
    assert ("lo", "127.0.0.1") in [(item.name, item.address) for item in facts.interfaces]
    assert all(version for _, version in facts.versions)
    assert facts.nofile > 0
    assert facts.disks
    parsed = here.parse_gpus("0, NVIDIA H100, 570.1, 81559, 81000\nNo devices were found\n")
    assert parsed == (Gpu(0, "NVIDIA H100", "570.1", 81559 << 20, 81000 << 20),)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, None),
        ({"num_replicas": 4}, None),
        ({"num_replicas": 5}, "5 × fake) need 5 CPUs, but the cluster has 4."),
        ({"num_cpus": 3}, "A rank of fake wants 3 CPUs, but no node has more than 2"),
        ({"engine": {"tensor_parallel_size": 2, "device": "cuda"}}, "need 2 GPUs, but the cluster has 1."),
        ({"num_cpus": 0.5, "engine": {"pipeline_parallel_size": 3, "tensor_parallel_size": 3}}, "9 ranks each) need"),
        ({"autoscaling": {"min_replicas": 0, "max_replicas": 9}}, None),
        ({"autoscaling": {"min_replicas": 5, "max_replicas": 9}}, "need 5 CPUs"),
    ],
)
def test_does_it_fit(values, said):
    models = DeploymentConfig.from_mapping({"model": "fake", **values}).models
    told = shortage(models, [NodeResources(1, 2), NodeResources(0, 2)])
    assert (told is None) == (said is None)
    assert said is None or said in told


@pytest.fixture(scope="module")
def cluster():
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def doctor(*args):
    command = [sys.executable, "-m", "octavo.cluster.cli", "doctor", *args]
    env = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=90, env=env, check=False)


def test_a_cluster_and_a_node_of_it_that_hangs(cluster, tmp_path):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        config = tmp_path / "model.yaml"
        (tmp_path / "weights").mkdir()
        config.write_text(f"model: {tmp_path / 'weights'}\nnum_replicas: 2\n")
        said = doctor("--address", cluster.address, "--json", "--config", str(config), "--port", str(port))
    told = json.loads(said.stdout)
    verdicts = {check["name"]: check["verdict"] for check in told["checks"]}
    assert said.returncode == 1
    assert verdicts.pop("ports") == "fail"  # the only thing wrong
    verdicts.pop("limits")  # the machine's own
    assert set(verdicts.values()) == {"ok"}, told["checks"]
    assert len(told["nodes"]) == 2
    assert [link["error"] for link in told["links"]] == [None, None]
    assert (told["collectives"][0]["num_ranks"], told["collectives"][0]["errors"]) == (2, [])

    node = cluster.add_node(num_cpus=1)
    raylet = node.all_processes["raylet"][0].process.pid
    os.kill(raylet, signal.SIGSTOP)
    try:
        said = doctor("--address", cluster.address, "--timeout", "15")
    finally:
        os.kill(raylet, signal.SIGCONT)
    assert said.returncode == 1, said.stdout + said.stderr
    assert f"{node.node_id[:6]} does not answer: it did not answer within 15 s." in said.stdout
    assert "gloo over 2 ranks" in said.stdout  # the others are checked all the same


def test_no_cluster():
    said = doctor("--address", "127.0.0.1:1")
    assert said.returncode == 2
    assert said.stderr.startswith("octavo: There is no Ray cluster at 127.0.0.1:1")
    assert "Traceback" not in said.stderr
