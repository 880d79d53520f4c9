"""What a replica tells an ingress that asked: over the real side channel, in one process, without Ray."""

import asyncio
import random
import time

import pytest
from fakes import fake_replica, request, until

from octavo.cluster import publisher, wire
from octavo.cluster.routing.fleet import Fleet
from octavo.cluster.routing.policies import make_policy
from octavo.cluster.routing.watch import Watch
from octavo.cluster.token_receiver import TokenReceiver
from octavo.engine.core.blocks import BlockLog, BlockPool
from octavo.engine.core.prefix import Chain


class Ingress:
    """A receiver, a fleet, and a watch that subscribes with the replicas of this process."""

    async def start(self, *replicas):
        self.receiver = TokenReceiver()
        await self.receiver.start("127.0.0.1")
        self.fleet = Fleet(make_policy("prefix"), 1 << 16)
        self.by_name = {f"replica-{i}": replica for i, replica in enumerate(replicas)}
        self.subscribed = []

        async def subscribe(name):
            self.subscribed.append(name)
            await self.by_name[name].subscribe(wire.encode_ingress(self.receiver.address))

        self.watch = Watch(self.fleet, subscribe)
        self.receiver.listeners.append(self.watch)
        self.watch.replicas_changed(dict.fromkeys(self.by_name, True))
        await until(lambda: self.receiver.stats.keys() == self.by_name.keys())
        return self

    async def stop(self):
        await self.watch.close()
        await self.receiver.stop()

    def names(self, name):
        return self.fleet.index.names(name)


async def run(replica, given):
    """The replica's engine computes a request nobody listens to."""
    replica._loop.submit(given)
    await until(lambda: not replica._loop.num_live)


@pytest.fixture
async def two():
    replicas = [fake_replica(f"replica-{i}") for i in range(2)]
    ingress = await Ingress().start(*replicas)
    yield ingress, replicas
    await ingress.stop()
    await asyncio.gather(*(replica.close() for replica in replicas))


def long(name, prompt=600):
    given = request(str(name), prompt=8, max_tokens=2)
    object.__setattr__(given, "prompt_token_ids", tuple(random.Random(repr(name)).choices(range(97, 123), k=prompt)))
    return given


async def test_blocks_and_load_reach_an_ingress_that_sent_nothing(two):
    ingress, replicas = two
    given = long("a")
    await run(replicas[0], given)
    chain = Chain(given.prompt_token_ids, 16)
    await until(lambda: ingress.fleet.index.match(chain) == {"replica-0": 37})
    assert ingress.names("replica-0") == set(replicas[0]._loop.pool.names())
    await until(lambda: ingress.receiver.stats["replica-0"].steps > 0)


async def test_an_idle_replica_reports_every_second(two, monkeypatch):
    ingress, _ = two
    seen = []
    monkeypatch.setattr(ingress.fleet, "observe", lambda name, stats, at: seen.append((name, time.monotonic() - at)))
    await asyncio.sleep(2.5)
    names = [name for name, _ in seen]
    assert 2 <= names.count("replica-0") <= 3
    assert all(0 <= age < 0.5 for _, age in seen)


async def test_a_snapshot_in_chunks_while_the_engine_works(monkeypatch):
    monkeypatch.setattr(publisher, "CHUNK", 7)
    replica = fake_replica("replica-0", step_s=0.0)
    first = await Ingress().start(replica)  # the log is open before the second comes
    for number in range(8):
        await run(replica, long(number))
    work = asyncio.create_task(all_of(run(replica, long(number)) for number in range(8, 40)))  # evicts, too
    second = await Ingress().start(replica)
    await work
    held = set(replica._loop.pool.names())
    assert len(held) > 900
    for ingress in first, second:
        await until(lambda ingress=ingress: ingress.names("replica-0") == held)
    await first.stop()
    await second.stop()
    await until(lambda: replica._loop.pool.log is None)  # nobody listens: nothing is recorded
    await replica.close()


async def all_of(coroutines):
    for coroutine in coroutines:
        await coroutine


async def test_missing_changes_are_made_up_for_by_a_snapshot(two):
    ingress, replicas = two
    await run(replicas[0], long("a"))
    await until(lambda: len(ingress.names("replica-0")) == len(replicas[0]._loop.pool.names()))
    (task,) = replicas[0]._sender._channels.values()
    task.result()._num_notes += 1  # one is lost
    ingress.subscribed.clear()
    await run(replicas[0], long("b"))
    await until(lambda: ingress.subscribed == ["replica-0"])
    await until(lambda: ingress.names("replica-0") == set(replicas[0]._loop.pool.names()))


async def test_more_changes_than_the_log_holds(two):
    ingress, replicas = two
    pool = replicas[0]._loop.pool
    pool.log = BlockLog(limit=5)
    await run(replicas[0], long("a"))
    await until(lambda: len(ingress.names("replica-0")) >= 37)
    assert ingress.names("replica-0") == set(pool.names())


async def test_a_channel_that_broke_is_asked_for_again(two):
    ingress, replicas = two
    await run(replicas[0], long("a"))
    await until(lambda: bool(ingress.names("replica-0")))
    ingress.subscribed.clear()
    (task,) = replicas[0]._sender._channels.values()
    await task.result()._channel.close()
    await until(lambda: ingress.subscribed == ["replica-0"])
    await until(lambda: ingress.names("replica-0") == set(replicas[0]._loop.pool.names()))
    assert ingress.fleet.place(placing_of(long("a")))[0] == "replica-0"


def placing_of(given):
    from octavo.cluster.routing.fleet import Placing

    return Placing(len(given.prompt_token_ids), Chain(given.prompt_token_ids, 16))


async def test_a_replica_that_left_is_forgotten(two):
    ingress, replicas = two
    await run(replicas[0], long("a"))
    await until(lambda: bool(ingress.names("replica-0")))
    ingress.watch.replicas_changed({"replica-1": True})
    assert ingress.fleet.index.match(Chain(long("a").prompt_token_ids, 16)) == {}
    await run(replicas[0], long("b"))  # what it still says is not heard
    await asyncio.sleep(0.2)
    assert ingress.fleet.replicas == ("replica-1",)
    assert not ingress.names("replica-0")


@pytest.mark.parametrize("seed", range(4))
def test_the_log_leads_from_any_list_of_names_to_the_pool_s(seed):
    rng = random.Random(seed)
    pool, known, taken = BlockPool(40), set(), []
    log = pool.log = BlockLog(limit=1000 if seed % 2 else 30)
    for step in range(2000):
        match rng.random():
            case x if x < 0.4 and pool.available:
                (block,) = pool.take(1)
                pool.set_name(block, rng.randrange(120).to_bytes(16))
                taken.append(block)
            case x if x < 0.8 and taken:
                pool.release([taken.pop(rng.randrange(len(taken)))])
            case x if x < 0.81:
                pool.forget_names()
            case x if x < 0.9:
                changes = log.drain()
                if changes.lost:
                    known = set(pool.names())
                else:
                    if changes.cleared:
                        known.clear()
                    known |= set(changes.stored)
                    known -= set(changes.evicted)
                assert known == set(pool.names()), step
        pool.check()
