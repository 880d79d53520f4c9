"""The side channel by itself: a replica, an ingress and gRPC between them, all in one process; no Ray runs."""

import asyncio
import time
from dataclasses import replace

import fakes
import grpc
import pytest
from fakes import INFO, fake_loop, fake_replica, local_client, pooled_request, request, until

from octavo.cluster import token_sender, wire
from octavo.cluster.ingress.client import HandedOver, ReplicaLost
from octavo.cluster.progress import Progress
from octavo.cluster.replica import Host
from octavo.cluster.routing import client as routing_client
from octavo.cluster.routing.fleet import Placing
from octavo.cluster.token_receiver import TokenReceiver
from octavo.engine.core.prefix import Chain
from octavo.engine.errors import CapacityError, RankLost, RequestError
from octavo.protos.octavo.v1 import tokens_pb2, tokens_pb2_grpc


@pytest.fixture
async def side():
    """(replica, client, receiver) on a slow-enough fake engine."""
    replica = fake_replica(step_s=0.002, max_num_seqs=8, max_num_queued_reqs=8)
    client, receiver = await local_client(replica)
    yield replica, client, receiver
    await replica.close()
    await receiver.stop()


def straight(given, **options):
    """The tokens of `given` from an engine nobody is between."""
    deltas = []
    loop = fake_loop(deltas.extend, **options)
    loop.start()
    loop.submit(given)
    while not deltas or deltas[-1].finish_reason is None:
        time.sleep(0.005)
    loop.stop()
    return [token for delta in deltas for token in delta.token_ids]


async def collect(client, given):
    tokens: dict[int, list[int]] = {}
    reasons = {}
    async for delta in client.generate(given):
        assert delta.request_id == given.request_id
        tokens.setdefault(delta.index, []).extend(delta.token_ids)
        if delta.finish_reason:
            reasons[delta.index] = delta.finish_reason
    return tokens, reasons


async def test_tokens_arrive_as_the_engine_made_them(side):
    _, client, receiver = side
    given = request(max_tokens=30, logprobs=2)
    tokens, reasons = await collect(client, given)
    assert tokens == {0: straight(given)}
    assert reasons == {0: "length"}
    assert await client.info() == INFO
    assert (await client.stats())["replica-1"].generation_tokens >= 30
    assert receiver.stats["replica-1"].steps > 0


async def test_many_requests_share_one_channel(side, monkeypatch):
    replica, client, receiver = side
    batches = []
    deliver = TokenReceiver.deliver
    monkeypatch.setattr(TokenReceiver, "deliver", lambda *a: (batches.append(len(a[2].deltas)), deliver(*a)))
    answers = await asyncio.gather(*(collect(client, request("same", prompt=8 + i, max_tokens=20)) for i in range(8)))
    for i, (tokens, _) in enumerate(answers):
        assert tokens == {0: straight(request(prompt=8 + i, max_tokens=20))}
    assert len(replica._sender._channels) == 1
    assert max(batches) >= 8  # one message for a step of eight, or for several of them
    assert len(batches) < 8 * 20 / 2
    assert not receiver._open


async def test_pooled_vectors_arrive_as_the_engine_made_them(side):
    _, client, _ = side
    given = [pooled_request(f"r{i}", 8 + 30 * i, pooling_type=way) for i, way in enumerate(("last", "mean", "cls"))]
    wanted: dict[str, bytes] = {}
    loop = fake_loop(lambda deltas: wanted.update((d.request_id, d.pooled) for d in deltas))
    loop.start()
    for each in given:
        loop.submit(each)
    await until(lambda: len(wanted) == 3)
    loop.stop()

    async def pool(each):
        (delta,) = [delta async for delta in client.generate(each)]
        return delta.request_id, delta.pooled

    assert dict(await asyncio.gather(*map(pool, given))) == wanted


async def test_parallel_samples_end_one_by_one(side):
    _, client, _ = side
    tokens, reasons = await collect(client, request(n=3, temperature=1.0, max_tokens=5))
    assert set(tokens) == {0, 1, 2}
    assert [len(tokens[i]) for i in range(3)] == [5, 5, 5]
    assert set(reasons.values()) == {"length"}


async def test_first_token_is_not_held_back():
    replica = fake_replica(step_s=0.05)
    client, receiver = await local_client(replica)
    await collect(client, request(max_tokens=1))  # forms the channel
    started = time.monotonic()
    stream = client.generate(request(max_tokens=100))
    await anext(stream)
    assert time.monotonic() - started < 0.2  # the first step's end or the second's, not the hundredth's
    await stream.aclose()
    await replica.close()
    await receiver.stop()


async def test_closing_the_iterator_frees_the_request(side):
    replica, client, _ = side
    stream = client.generate(request(max_tokens=1500))
    await anext(stream)
    assert replica._loop.num_live == 1
    await stream.aclose()
    await until(lambda: replica._loop.num_live == 0 and not replica._live)
    assert replica._loop.stats().kv_blocks_held == 0


async def test_errors_stay_typed(side):
    replica, client, _ = side
    with pytest.raises(RequestError) as caught:
        await collect(client, request(prompt=8, max_tokens=10, stop_token_ids=(999,)))
    assert caught.value.param == "stop_token_ids"
    streams = [client.generate(request(str(i), max_tokens=1500)) for i in range(8)]
    for stream in streams:
        await anext(stream)
    queued = [asyncio.create_task(collect(client, request(f"q{i}", max_tokens=5))) for i in range(8)]
    await until(lambda: replica._loop.stats().num_waiting == 8)
    with pytest.raises(CapacityError):
        await collect(client, request("one-too-many"))
    queued[0].cancel()  # while still queued
    await until(lambda: replica._loop.stats().num_waiting == 7)
    for stream in streams:
        await stream.aclose()
    assert all(reasons == {0: "length"} for _, reasons in await asyncio.gather(*queued[1:]))


async def test_abort_by_the_client_s_id(side):
    replica, client, _ = side
    task = asyncio.create_task(collect(client, request("long", max_tokens=1500)))
    await until(lambda: replica._loop.num_live == 1)
    assert replica.abort("other") == 0
    assert replica.abort("long") == 1
    assert (await task)[1] == {0: "abort"}


async def test_a_lost_ingress_aborts_its_requests(side):
    replica, client, receiver = side
    task = asyncio.create_task(collect(client, request(max_tokens=1500)))
    await until(lambda: replica._loop.num_live == 1 and bool(receiver.stats))
    await receiver.stop()
    with pytest.raises(ReplicaLost):
        await task
    await until(lambda: replica._loop.num_live == 0 and not replica._live)
    await until(lambda: not replica._sender._channels)
    assert not receiver.stats


async def test_a_lost_replica_ends_only_what_it_carried():
    first, second = fake_replica("one", step_s=0.002), fake_replica("two", step_s=0.002)
    client, receiver = await local_client(first)
    doomed = asyncio.create_task(collect(client, request("doomed", max_tokens=1500)))
    await until(lambda: "one" in receiver.stats)
    client._handle.replica = second
    spared = asyncio.create_task(collect(client, request("spared", max_tokens=200)))
    await until(lambda: "two" in receiver.stats)
    (channel,) = [task.result() for task in first._sender._channels.values()]
    await channel._channel.close()  # what a dead process does
    with pytest.raises(ReplicaLost):
        await doomed
    assert (await spared)[1] == {0: "length"}
    await asyncio.gather(first.close(), second.close())
    await receiver.stop()


async def test_an_ingress_that_cannot_be_reached(side, monkeypatch):
    replica, client, _ = side
    monkeypatch.setattr(token_sender, "CONNECT_S", 0.3)
    nobody = wire.IngressAddress("gone", "127.0.0.1:9", "x")
    monkeypatch.setattr(TokenReceiver, "address", nobody)
    with pytest.raises(ReplicaLost, match="cannot reach"):
        await collect(client, request())
    assert replica._loop.num_live == 0
    await until(lambda: not replica._sender._channels)


async def test_strangers_are_turned_away(side):
    _, _, receiver = side
    async with grpc.aio.insecure_channel(receiver.address.address) as channel:
        call = tokens_pb2_grpc.TokenChannelStub(channel).Stream(metadata=(("octavo-token", "guess"),))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_deltas_of_unknown_requests_are_dropped(side):
    _, _, receiver = side
    batch = tokens_pb2.TokenBatch(deltas=[tokens_pb2.TokenDelta(stream_id=12345, token_ids=[1])])
    carried = {12345}
    receiver.deliver("replica-1", batch, carried)
    assert not carried


async def test_the_engine_s_death_is_a_lost_replica_and_bad_health(side):
    replica, client, _ = side
    task = asyncio.create_task(collect(client, request(max_tokens=1500)))
    await until(lambda: replica._loop.stats().num_running == 1)
    replica.check_health()
    replica._loop.core.process.launch = lambda plan: 1 / 0
    with pytest.raises(ReplicaLost, match="engine has failed"):
        await task
    await until(lambda: is_unhealthy(replica))
    with pytest.raises(ReplicaLost):
        await collect(client, request())


def is_unhealthy(replica):
    try:
        replica.check_health()
    except RankLost:
        return True
    return False


async def test_a_replica_that_fails_while_idle_says_so():
    told = []
    replica = fake_replica(host=Host(failed=told.append))
    replica._loop.failure = RankLost("Rank 1 on 10.0.0.2 (pid 7) was killed.")
    await until(lambda: bool(told))
    assert "Rank 1 on 10.0.0.2" in str(told[0])
    assert is_unhealthy(replica)
    await replica.close()


async def test_a_busy_event_loop_does_not_hide_a_failure():
    told = []
    replica = fake_replica(host=Host(failed=lambda error: told.append(time.monotonic())))
    started = time.monotonic()
    replica._loop.failure = RankLost("gone")
    time.sleep(0.5)  # noqa: ASYNC251 - the event loop stands still
    assert told
    assert told[0] - started < 0.4
    await replica.close()


async def test_the_first_token_proves_a_replica():
    replica = fake_replica()
    await replica.first_token()
    assert replica._loop.stats().generation_tokens == 1
    await replica.close()
    broken = fake_replica(step_timeout_s=0.1, step_s=5.0)
    with pytest.raises(RankLost, match="first token"):
        await broken.first_token()


async def test_a_replica_that_generates_nothing_proves_itself_by_pooling(monkeypatch):
    info = replace(INFO, pooling=replace(INFO.pooling, generates=False, is_causal=False, pooling_type="mean"))
    monkeypatch.setattr(fakes, "INFO", info)
    replica = fake_replica()
    await replica.first_token()
    assert (replica._loop.stats().generation_tokens, replica._loop.stats().first_tokens) == (0, 1)
    await replica.close()


async def test_a_draining_replica_hands_over_before_it_is_killed(side):
    draining = []
    replica = fake_replica(step_s=0.002, host=Host(is_draining=lambda: bool(draining), drain_timeout_s=0.5))
    client, receiver = await local_client(replica)
    task = asyncio.create_task(collect(client, request(max_tokens=2000)))
    await until(lambda: replica._loop.num_live == 1)
    started = time.monotonic()
    draining.append(True)
    with pytest.raises(HandedOver):
        await task
    assert 0.2 < time.monotonic() - started < 0.5
    with pytest.raises(HandedOver):
        await collect(client, request())
    await until(lambda: replica._loop.stats().kv_blocks_held == 0)
    await replica.close()
    await receiver.stop()


async def test_an_accepted_request_is_lost_with_its_channel_before_its_first_token():
    replica = fake_replica(step_s=0.05, max_num_seqs=1)
    client, receiver = await local_client(replica)
    running = asyncio.create_task(collect(client, request("running", max_tokens=1500)))
    await until(lambda: replica._loop.stats().num_running == 1)
    queued = asyncio.create_task(collect(client, request("queued")))
    await until(lambda: replica._loop.stats().num_waiting == 1)
    broken = []
    receiver._on_broken = lambda name, host: broken.append((name, host))
    client._handle.forget_calls()  # a dead process answers no control call either
    (channel,) = [task.result() for task in replica._sender._channels.values()]
    await channel._channel.close()
    for task in running, queued:
        with pytest.raises(ReplicaLost):
            await task
    assert broken == [("replica-1", "127.0.0.1")]
    await collect(client, request())
    await replica.close()
    await until(lambda: not receiver.stats)
    assert len(broken) == 1  # a channel that is closed has not broken
    await receiver.stop()


async def test_what_an_old_attempt_still_sends_reaches_nobody(side):
    _, _, receiver = side
    old = receiver.open("r")
    receiver.close(old)
    new = receiver.open("r")
    late = tokens_pb2.TokenBatch(deltas=[tokens_pb2.TokenDelta(stream_id=old.stream_id, token_ids=[1])])
    receiver.deliver("replica-1", late, {old.stream_id})
    receiver.lose("replica-1", {old.stream_id})
    assert new.replica is None
    assert not new.mailbox._pending
    assert new.mailbox._error is None
    receiver.close(new)


async def test_a_request_that_no_replica_accepts(side, monkeypatch):
    _, client, _ = side
    never = asyncio.get_running_loop().create_future
    monkeypatch.setattr(type(client._handle), "generate", _Never(never), raising=False)
    with pytest.raises(ReplicaLost, match="No replica has taken"):
        async for _ in client.attempt(request(), print, within_s=0.1):
            pass
    monkeypatch.setattr(routing_client, "LOOK_S", 0.05)
    fleet = client._pool.fleet
    fleet.set_replicas({"replica-1": True})
    monkeypatch.setattr(client._pool, "placing", lambda *given: _placed(Placing(8, Chain((), 16)), fleet))
    waiting = asyncio.create_task(collect(client, request()))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    fleet.lose("replica-1")
    with pytest.raises(ReplicaLost, match="replica-1 is not heard of"):
        await waiting


def _placed(placing, fleet):
    fleet.place(placing)
    return placing


class _Never:
    def __init__(self, make):
        self.make = make

    def remote(self, *arguments):
        return self.make()


def test_health_is_forward_progress():
    progress = Progress(step_timeout_s=10)
    for now in range(0, 100, 5):
        progress.check(float(now), 7, has_work=False)  # idle for long is healthy
    progress.check(100.0, 7, has_work=True)  # work has only just come
    progress.check(109.0, 7, has_work=True)
    progress.check(111.0, 8, has_work=True)  # a step finished
    progress.check(120.0, 8, has_work=True)
    with pytest.raises(RankLost, match="No step"):
        progress.check(122.0, 8, has_work=True)


async def test_a_wedged_engine_is_unhealthy():
    replica = fake_replica(step_s=1.0, step_timeout_s=0.05)
    client, receiver = await local_client(replica)
    task = asyncio.create_task(collect(client, request()))
    await until(lambda: replica._loop.num_live == 1)
    replica.check_health()
    with pytest.raises(ReplicaLost, match="No step has finished"):
        await asyncio.wait_for(task, 1.0)
    assert is_unhealthy(replica)
    await replica.close()
    await receiver.stop()
