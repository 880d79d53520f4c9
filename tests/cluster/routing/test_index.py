"""BlockIndex against a plain dict of sets, on random histories of chains that replicas store and evict."""

import random

import pytest

from octavo.cluster.routing.index import GRAIN, BlockIndex
from octavo.engine.core.prefix import Chain, next_name, root_name

SIZE = 4
REPLICAS = [f"replica-{i}" for i in range(5)]


def prompt(rng, trunks):
    """A random trunk, cut anywhere, with something of its own behind it."""
    trunk = rng.choice(trunks)
    return trunk[: rng.randrange(len(trunk))] + rng.choices(range(50), k=rng.randrange(40))


def names(tokens, salt=None):
    chain = Chain(tokens, SIZE, salt)
    return chain.names(len(chain))


def reference(held, tokens):
    """Leading blocks of `tokens` that each replica holds, for those that hold any."""
    found = {}
    for replica, blocks in held.items():
        count = 0
        for name in names(tokens):
            if name not in blocks:
                break
            count += 1
        if count:
            found[replica] = count
    return found


def check(found, expected, num_blocks):
    """To the block in prompts up to 1 / GRAIN blocks long; of longer ones the last few may be missing."""
    grain = max(1, int(num_blocks * GRAIN))
    for replica, count in expected.items():
        assert count - grain < found.pop(replica, 0) <= count
    assert not found


@pytest.mark.parametrize("seed", range(4))
def test_matches_are_the_longest_prefixes(seed):
    rng = random.Random(seed)
    trunks = [rng.choices(range(50), k=rng.choice((30, 300, 4000))) for _ in range(4)]
    index, held = BlockIndex(1 << 20), {replica: set() for replica in REPLICAS}
    for _ in range(200):
        replica, tokens = rng.choice(REPLICAS), prompt(rng, trunks)
        match rng.random():
            case x if x < 0.6:
                index.store(replica, names(tokens))
                held[replica].update(names(tokens))
            case x if x < 0.9:  # leaves go first, so what is held stays closed under "the block before"
                keep = rng.randrange(len(tokens) // SIZE + 1)
                kept = set(names(tokens)[:keep])
                gone = [name for name in held[replica] if name not in kept]
                index.evict(replica, gone)
                held[replica].difference_update(gone)
            case x if x < 0.95:
                index.drop(replica)
                held[replica].clear()
            case _:
                for _ in index.sweep():
                    pass
        for _ in range(3):
            asked = prompt(rng, trunks)
            check(index.match(Chain(asked, SIZE)), reference(held, asked), len(asked) // SIZE)
    for _ in index.sweep():
        pass
    assert len(index) == len(set().union(*held.values()))
    assert len(index._replicas) <= 2 * len(REPLICAS) + 32  # bits are given out again


def test_use_between_two_steps_of_a_sweep():
    index = BlockIndex(1 << 20)
    chains = [names(random.Random(i).choices(range(50), k=4000)) for i in range(10)]
    for chain in chains:
        index.store("gone", chain)
        index.store("here", chain)
    index.drop("gone")
    sweep = index.sweep()
    next(sweep)
    index.evict("here", chains[9])
    index.store("gone", chains[0])  # the same replica again: another bit, which the sweep must leave alone
    index.drop("here")
    for _ in sweep:
        pass
    tokens = random.Random(0).choices(range(50), k=4000)
    assert index.match(Chain(tokens, SIZE)) == {"gone": 1000}
    for _ in index.sweep():
        pass
    assert len(index) == 1000


def test_memory_is_bounded_and_ancestors_outlive_their_leaves():
    index = BlockIndex(100)
    first = random.Random(1).choices(range(50), k=60 * SIZE)
    index.store("a", names(first))
    index.store("a", names(random.Random(2).choices(range(50), k=60 * SIZE)))
    assert len(index) == 100
    assert index.match(Chain(first, SIZE)) == {"a": 40}
    index.touch(Chain(first, SIZE), 40)
    index.store("b", names(random.Random(3).choices(range(50), k=50 * SIZE)))
    assert index.match(Chain(first, SIZE)) == {"a": 40}  # what is used stays


def test_salts_share_nothing():
    tokens = list(range(40))
    index = BlockIndex(100)
    index.store("a", names(tokens, "mine"))
    assert index.match(Chain(tokens, SIZE, "mine")) == {"a": 10}
    assert index.match(Chain(tokens, SIZE, "yours")) == index.match(Chain(tokens, SIZE)) == {}


def test_a_chain_names_blocks_as_the_prefix_cache_does_and_no_more_than_asked():
    tokens = random.Random(5).choices(range(1 << 20), k=1000)
    chain, parent, expected = Chain(tokens, 16, "salt"), root_name("salt"), []
    for start in range(0, 1000 - 15, 16):
        parent = next_name(parent, tokens[start : start + 16])
        expected.append(parent)
    assert len(chain) == len(expected) == 62
    assert chain.names(7) == expected[:7]
    assert chain.names(3) == expected[:7]
    assert chain.names(62) == expected
    index = BlockIndex(100)
    cold = Chain(tokens, 16)
    index.store("a", expected)
    index.match(cold)
    assert len(cold._names) == 1  # nobody holds the first block: the others are not even named
