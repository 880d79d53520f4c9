"""The policies on simulated pools; benchmarks/routing.py does the same for longer."""

import random

import pytest

from octavo.cluster.routing.fleet import Fleet
from octavo.cluster.routing.policies import make_policy
from octavo.cluster.routing.simulation import Simulation
from octavo.cluster.routing.workloads import Conversations, Strangers, SystemPrompts


def simulate(policy, workload, ingresses=1):
    """(hit rate, mean TTFT in s, requests)"""
    random.seed(0)
    served = Simulation([Fleet(make_policy(policy), 1 << 18) for _ in range(ingresses)], 4).run(workload)
    hits = sum(each.cached for each in served) / sum(len(each.arrival.prompt) for each in served)
    if policy == "prefix" and ingresses == 1:
        predicted, found = (sum(getattr(each, name) for each in served) for name in ("predicted", "cached"))
        assert abs(predicted - found) <= 0.02 * max(found, 1)
    return hits, sum(each.ttft_s for each in served) / len(served), len(served)


@pytest.mark.parametrize(
    "workload",
    [lambda: Conversations(40, 2.0), lambda: SystemPrompts(200, 40.0), lambda: SystemPrompts(200, 40.0, burst=16)],
    ids=["conversations", "system prompts", "bursts"],
)
def test_prefix_beats_round_robin_where_something_is_shared(workload):
    prefix, turns = simulate("prefix", workload()), simulate("round_robin", workload())
    assert prefix[2] == turns[2] > 100
    assert prefix[0] > turns[0] + 0.1
    assert prefix[1] < 0.8 * turns[1]


@pytest.mark.parametrize(
    "workload",
    [lambda: Strangers(200, 36.0), lambda: Strangers(200, 30.0, burst=24), lambda: Strangers(200, 24.0, spread=1.6)],
    ids=["steady", "bursts", "skewed"],
)
def test_prefix_is_as_good_as_least_loaded_where_nothing_is_shared(workload):
    prefix, least = simulate("prefix", workload()), simulate("least_loaded", workload())
    assert prefix[0] == least[0] == 0
    assert prefix[1] <= 1.05 * least[1]


def test_ingresses_that_know_of_each_other_only_through_the_replicas_do_not_herd():
    prefix, turns = (simulate(policy, SystemPrompts(200, 40.0, burst=16), 4) for policy in ("prefix", "round_robin"))
    assert prefix[0] > turns[0]
    assert prefix[1] < turns[1]
    prefix, least = (simulate(policy, Strangers(200, 36.0), 4) for policy in ("prefix", "least_loaded"))
    assert prefix[1] <= 1.05 * least[1]
