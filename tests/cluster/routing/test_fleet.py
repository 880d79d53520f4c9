"""Fleet: what it makes of news, and where it then sends requests."""

import random
import threading

from octavo.cluster.routing import fleet as fleets
from octavo.cluster.routing.fleet import Fleet, Placing
from octavo.cluster.routing.policies import make_policy
from octavo.engine.core.blocks import BlockChanges
from octavo.engine.core.prefix import Chain
from octavo.engine.types import EngineStats

SIZE = 16


def tokens(name, count):
    return tuple(random.Random(name).choices(range(1000), k=count))


def placing(prompt, **options):
    return Placing(len(prompt), Chain(prompt, SIZE), **options)


def changes(prompt, **options):
    chain = Chain(prompt, SIZE)
    return BlockChanges(stored=tuple(chain.names(len(chain))), **options)


def fleet(policy="prefix", replicas=("a", "b", "c")):
    made = Fleet(make_policy(policy), 1 << 16)
    made.set_replicas(dict.fromkeys(replicas, False))
    return made


def ranked(made, prompt, **options):
    """Where a request would be sent, best first; it is over at once."""
    asked = placing(prompt, **options)
    found = made.place(asked)
    made.ended(asked)
    return found


def first(made, prompt, **options):
    return ranked(made, prompt, **options)[0]


def test_what_was_just_placed_counts_before_the_replica_says_so():
    made, placed = fleet("least_loaded"), []
    for number in range(9):
        placed.append(placing(tokens(number, 1000)))
        made.place(placed[-1])
    assert sorted(p.replica for p in placed) == [*"aaabbbccc"]
    for each in placed:
        made.started(each, 0)
        made.ended(each)  # harmless
    assert {member.load.waiting for member in made._members.values()} == {0.0}


def test_the_queue_of_a_replica_is_counted_once():
    made = fleet(replicas=("a", "b"))
    mine = placing(tokens(1, 1000))
    (own, other) = made.place(mine)
    made.observe(own, EngineStats(num_waiting=1, waiting_tokens=1000), 0.0)  # it is mine that waits there
    with_mine = made._members[own].load.waiting
    assert 1000 <= with_mine < 1000 + fleets.QUEUED_TOKENS + fleets.RUNNING_TOKENS + 1
    made.observe(own, EngineStats(num_waiting=1, waiting_tokens=500, prefill_tokens=1500), 0.0)
    assert made._members[own].load.waiting == with_mine + 1000  # another ingress sent the rest
    assert first(made, tokens(2, 10)) == other


def test_others_queues_shrink_by_the_hit_rate():
    made = fleet(replicas=("a", "b"))
    made.observe("a", EngineStats(num_running=1), 0.0)
    made.observe("a", EngineStats(waiting_tokens=10000, prefix_queries=1 << 20, prefix_hits=9 << 16), 0.0)
    assert made._members["a"].load.waiting == 10000 * (1 - 9 / 16)


def test_blocks_attract_until_they_are_evicted_or_their_replica_leaves():
    made, prompt = fleet(), tokens(0, 800)
    made.change("b", changes(prompt))
    assert {first(made, prompt) for _ in range(10)} == {"b"}
    made.change("b", BlockChanges(evicted=changes(prompt).stored))
    assert {first(made, prompt) for _ in range(50)} == {*"abc"}
    made.change("b", changes(prompt))
    made.change("b", changes(tokens(1, 800), cleared=True))
    assert {first(made, prompt) for _ in range(50)} == {*"abc"}
    assert first(made, tokens(1, 800)) == "b"
    made.set_replicas({"a": False, "c": False})
    assert {first(made, tokens(1, 800)) for _ in range(50)} == {*"ac"}
    made.change("b", changes(prompt))  # late news
    assert made.index.match(Chain(prompt, SIZE)) == {}
    for _ in made.tidy():
        pass
    assert len(made.index) == 0


def test_a_burst_with_one_beginning_stays_together_before_anything_is_cached():
    made, system = fleet(), tokens(0, 2000)
    burst = [placing(system + tokens(i, 100)) for i in range(1, 9)]
    for each in burst:
        made.place(each)
    assert len({each.replica for each in burst}) == 1
    assert [each.predicted for each in burst] == [0] + [2000] * 7
    for each in burst:
        made.ended(each)
    again = placing(system)
    made.place(again)
    assert again.predicted == 0  # they ended, and nobody said that anything is cached


def test_who_was_lost_or_is_silent_comes_last():
    made, prompt = fleet(), tokens(0, 800)
    made.change("a", changes(prompt))
    assert ranked(made, prompt, avoid=frozenset("a"))[-1] == "a"
    made.lose("b")
    assert ranked(made, prompt)[-1] == "b"
    made.observe("b", EngineStats(), 100.0)
    made.observe("c", EngineStats(), 100.0 - fleets.STALE_S)
    made.check_ages(100.1)
    assert {ranked(made, prompt)[-1] for _ in range(5)} == {"c"}
    made.observe("c", EngineStats(), 100.0)
    assert {first(made, tokens(9, 100)) for _ in range(50)} == {*"abc"}
    assert first(made, prompt, avoid=frozenset("abc")) == "a"  # nobody else is left


def test_a_request_that_found_no_place_tries_the_next():
    made, prompt = fleet(), tokens(0, 800)
    made.change("a", changes(prompt))
    asked = placing(prompt)
    tried = [made.place(asked)[0] for _ in range(3)]
    assert tried[0] == "a"
    assert sorted(tried) == [*"abc"]
    assert sum(member.own_requests for member in made._members.values()) == 1
    made.moved(asked, "a")
    assert (asked.replica, made._members["a"].own_tokens) == ("a", 800)
    made.ended(asked)
    assert not any(member.own_tokens for member in made._members.values())


def test_a_session_is_kept_whatever_the_policy():
    for policy in "prefix", "least_loaded", "round_robin":
        made = fleet(policy)
        assert len({first(made, tokens(i, 100), session="someone") for i in range(9)}) == 1


def test_an_empty_fleet_has_no_answer():
    made = fleet(replicas=())
    asked = placing(tokens(0, 100))
    assert made.place(asked) == []
    made.ended(asked)


def test_news_and_decisions_from_several_threads():
    made, prompts = fleet(), [tokens(i, 400) for i in range(20)]
    errors = []

    def work(seed):
        rng = random.Random(seed)
        try:
            for _ in range(400):
                prompt, replica = rng.choice(prompts), rng.choice("abc")
                match rng.randrange(5):
                    case 0:
                        made.change(replica, changes(prompt))
                    case 1:
                        made.change(replica, BlockChanges(evicted=changes(prompt).stored))
                    case 2:
                        made.set_replicas(dict.fromkeys(rng.sample("abc", 2), False))
                    case 3:
                        for _ in made.tidy():
                            pass
                    case _:
                        asked = placing(prompt)
                        assert len(set(made.place(asked))) >= 2
                        made.started(asked, 0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not any(member.own_tokens for member in made._members.values())


def test_what_is_used_is_forgotten_last():
    made = Fleet(make_policy("prefix"), 100)
    made.set_replicas({"a": False})
    made.change("a", changes(tokens(0, 50 * SIZE)))
    made.change("a", changes(tokens(1, 50 * SIZE)))
    first(made, tokens(0, 50 * SIZE))
    for _ in made.tidy():
        pass
    made.change("a", changes(tokens(2, 50 * SIZE)))
    assert made.index.match(Chain(tokens(0, 50 * SIZE), SIZE)) == {"a": 50}
    assert made.index.match(Chain(tokens(1, 50 * SIZE), SIZE)) == {}
