"""Ranks as Ray actors: the whole way of `LLM(..., tensor_parallel_size=2)`, and a replica whose ranks are on two nodes.

One cluster of two raylets, each with room for two ranks.
"""

import importlib.util
import os
import signal
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from octavo.engine.api import LLM
from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.core.engine import EngineCore
from octavo.engine.errors import ConfigError, RankLost
from octavo.engine.params import SamplingParams
from octavo.engine.types import RankStatus, Request

pytestmark = pytest.mark.live

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "models" / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

PROMPTS = tiny.prompts((5, 23, 1, 40))
SETTINGS = {
    "dtype": "float32",
    "block_size": 8,
    "max_model_len": 64,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 13,
    "max_num_batched_tokens": 24,
}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    made.add_node(num_cpus=2)
    ray.init(address=made.address, logging_level="ERROR", log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make("llama", tmp_path_factory.mktemp("checkpoints"))


def generate(core: EngineCore) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    got = {str(i): [] for i in range(len(PROMPTS))}
    for name, prompt in zip(got, PROMPTS, strict=True):
        core.add(Request(name, tuple(prompt), params))
    while core.has_work:
        for delta in core.step():
            assert delta.error is None, delta.error
            got[delta.request_id] += delta.token_ids
    return list(got.values())


class Driver:
    """What a Serve replica is to its ranks: an actor without CPUs in bundle 0 of a placement group."""

    def generate(self, path: str, **settings) -> tuple[list[list[int]], tuple[RankStatus, ...], int]:
        engine = build_engine(EngineConfig(path, **settings))
        try:
            return generate(engine.core), engine.core.ranks(), engine.core.stats().preemptions
        finally:
            engine.core.close()


def test_ranks_on_two_nodes_in_the_group_of_the_replica(folder):
    one = build_engine(EngineConfig(str(folder), **SETTINGS))
    expected = generate(one.core)
    one.core.close()
    group = placement_group([{"CPU": 2}] * 2, strategy="PACK")  # a node has room for one
    ray.get(group.ready(), timeout=60)
    place = PlacementGroupSchedulingStrategy(group, 0)
    driver = ray.remote(Driver).options(num_cpus=0, scheduling_strategy=place).remote()
    tokens, ranks, preemptions = ray.get(
        driver.generate.remote(str(folder), tensor_parallel_size=2, **SETTINGS), timeout=120
    )
    assert tokens == expected
    assert preemptions > 0
    assert [rank.node for rank in ranks] != [ranks[0].node] * 2
    ray.kill(driver)
    remove_placement_group(group)


def until_room(seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while ray.available_resources().get("CPU") != 4:
        assert time.monotonic() < deadline, "ranks are left"
        time.sleep(0.1)


def test_offline_and_a_rank_killed():
    until_room()
    llm = LLM("fake", tensor_parallel_size=2)
    params = SamplingParams(temperature=0.0, max_tokens=20)
    assert llm.generate(["Hello"], params, use_tqdm=False)[0].outputs[0].text == (
        LLM("fake").generate(["Hello"], params, use_tqdm=False)[0].outputs[0].text
    )
    assert [name for name, _ in llm.info.phases][:1] == ["start ranks"]
    first, second = llm._engine.core.ranks()
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    assert any(name.startswith("octavo rank 1/2 (stage 0, tp 1) ") for name in names)
    started = time.monotonic()
    os.kill(second.pid, signal.SIGKILL)
    with pytest.raises(RankLost, match=rf"Rank 1/2 \(stage 0, tp 1\) on node \S+, pid {second.pid}, was lost"):
        llm.generate(["Hello"], SamplingParams(max_tokens=3000), use_tqdm=False)
    assert time.monotonic() - started < 5
    assert not Path(f"/proc/{first.pid}").exists()
    llm.close()
    assert ray.is_initialized()  # it was not ours
    until_room()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tensor_parallel_size": 5}, "5 ranks .* need 5 CPUs, the cluster has 4"),
        ({"tensor_parallel_size": 2, "device": "cuda", "model": "real"}, "need 2 GPUs, the cluster has 0"),
    ],
)
def test_a_cluster_that_is_too_small_is_said_at_once(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_engine(EngineConfig(**{"model": "fake", **settings}))
