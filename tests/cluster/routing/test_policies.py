import random
from collections import Counter
from itertools import pairwise

import pytest

from octavo.cluster.routing.policies import (
    COMPUTE_WEIGHT,
    EQUAL_TOKENS,
    SESSION_SLACK_TOKENS,
    LeastLoaded,
    Load,
    Prefix,
    RoundRobin,
    keep_session,
    make_policy,
)
from octavo.engine.errors import ConfigError


def loads(*waiting, **options):
    return [Load(f"r{i}", waiting=tokens, **options) for i, tokens in enumerate(waiting)]


def names(ranked):
    return [load.replica for load in ranked]


@pytest.mark.parametrize("seed", range(5))
def test_every_policy_ranks_everybody_once(seed):
    rng = random.Random(seed)
    given = [Load(f"r{i}", rng.random() < 0.5, rng.uniform(0, 9999), rng.uniform(0, 2)) for i in range(50)]
    hits = {f"r{i}": rng.randrange(1000) for i in range(0, 50, 3)}
    for policy in Prefix(), LeastLoaded(), RoundRobin():
        assert sorted(names(policy.choose(given, 1000, hits))) == sorted(names(given))
        assert policy.choose([], 1000, {}) == []


@pytest.mark.parametrize("seed", range(5))
def test_prefix_minimises_what_is_left_to_compute(seed):
    rng = random.Random(seed)
    given = [Load(f"r{i}", False, rng.uniform(0, 5000), rng.choice((0.0, rng.random()))) for i in range(20)]
    hits = {f"r{i}": rng.randrange(3000) for i in range(0, 20, 2)}

    def cost(load):
        return load.waiting + (3000 - hits.get(load.replica, 0)) * (COMPUTE_WEIGHT + load.pressure)

    costs = [cost(load) for load in Prefix().choose(given, 3000, hits)]
    assert all(later > earlier - EQUAL_TOKENS for earlier, later in pairwise(costs))
    assert costs[0] < min(map(cost, given)) + EQUAL_TOKENS


def test_a_hit_is_left_for_a_queue_that_is_longer_than_it():
    worth = 1000 * COMPUTE_WEIGHT
    assert names(Prefix().choose(loads(worth - 50, 0), 2000, {"r0": 1000}))[0] == "r0"
    assert names(Prefix().choose(loads(worth + 50, 0), 2000, {"r0": 1000}))[0] == "r1"


def test_scarce_kv_is_avoided():
    given = loads(0, 0)
    given[0].pressure = 0.5
    assert {names(policy.choose(given, 1000, {}))[0] for policy in (Prefix(), LeastLoaded()) for _ in range(20)} == {
        "r1"
    }


def test_equals_are_taken_by_chance_and_local_ones_first():
    given = loads(*[10.0] * 8)
    for policy in Prefix(), LeastLoaded():
        first = Counter(names(policy.choose(given, 100, {}))[0] for _ in range(800))
        assert len(first) == 8
        assert max(first.values()) < 200
    given[3].is_local = given[5].is_local = True
    assert {names(Prefix().choose(given, 100, {}))[0] for _ in range(50)} == {"r3", "r5"}
    given[3].waiting = given[5].waiting = 200.0
    assert {names(Prefix().choose(given, 100, {}))[0] for _ in range(50)}.isdisjoint({"r3", "r5"})


def test_round_robin_takes_turns_whoever_comes_and_goes():
    policy, given = RoundRobin(), loads(5, 0, 9)
    assert [names(policy.choose(given, 1, {}))[0] for _ in range(6)] == ["r0", "r1", "r2"] * 2
    assert Counter(names(policy.choose(given[:2], 1, {}))[0] for _ in range(10)) == {"r0": 5, "r1": 5}


def test_sessions_spread_evenly_and_move_only_with_their_replica():
    given = loads(*[0.0] * 10)
    owners = {str(i): keep_session(given, str(i))[0].replica for i in range(4000)}
    counts = Counter(owners.values())
    assert len(counts) == 10
    assert max(counts.values()) < 500 > 300 < min(counts.values())
    fewer = [load for load in given if load.replica != "r4"]
    for session, owner in owners.items():
        now = keep_session(fewer, session)[0].replica
        assert now == owner or owner == "r4"
    random.shuffle(given)
    assert all(keep_session(given, session)[0].replica == owner for session, owner in owners.items())


def test_a_session_leaves_a_replica_that_is_much_more_loaded():
    given = loads(0.0, 0.0, 0.0)
    own = keep_session(given, "s")[0]
    own.waiting = SESSION_SLACK_TOKENS - 1
    assert keep_session(given, "s")[0] is own
    own.waiting = SESSION_SLACK_TOKENS + 1
    assert keep_session(given, "s") == given
    assert keep_session([], "s") == []


def test_policies_by_name(tmp_path, monkeypatch):
    assert isinstance(make_policy("prefix"), Prefix)
    (tmp_path / "my_policy.py").write_text(
        "class Backwards:\n    wants_hits = False\n    def choose(self, loads, num_tokens, hits):\n"
        "        return list(loads)[::-1]\n"
        "class NotAPolicy: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert names(make_policy("my_policy:Backwards").choose(loads(0, 0, 0), 1, {})) == ["r2", "r1", "r0"]
    for name, why in {
        "nowhere:Policy": "No module named 'nowhere'",
        "my_policy:Missing": "no attribute 'Missing'",
        "my_policy:NotAPolicy": "has no method choose",
    }.items():
        with pytest.raises(ConfigError, match=why) as caught:
            make_policy(name)
        assert name in str(caught.value)
