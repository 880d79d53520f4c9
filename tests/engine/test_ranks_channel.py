"""The channel between driver and ranks: bytes, who may connect, and which bundle a rank gets."""

import socket
import struct
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.core.plan import NewSequence, Row, RowResult, StepPlan, StepResult
from octavo.engine.parallel.layout import Layout
from octavo.engine.params import SamplingParams
from octavo.engine.process import wire
from octavo.engine.process.channel import ChannelClosed, Hub, dial
from octavo.engine.process.placement import order_bundles
from octavo.engine.types import TokenLogprobs

ints = st.integers(0, 1 << 40)
ids = st.lists(st.integers(0, 200_000), max_size=5).map(tuple)
params = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 2),
    seed=st.none() | st.integers(0, 1 << 62),
    stop_token_ids=ids,
    logit_bias=st.dictionaries(st.integers(0, 999), st.floats(-100, 100), max_size=3),
    stop=st.sampled_from([(), ("é", "\n\n")]),
    prompt_logprobs=st.none() | st.integers(0, 5),
)
new = st.builds(
    NewSequence, ints, ids, ints, params, st.integers(0, (1 << 64) - 1), ids, ids, st.lists(ids, max_size=2).map(tuple)
)
row = st.builds(Row, ints, ints, ints, ints, st.booleans(), st.none() | ints)
triples = st.lists(st.tuples(ints, ints, ints), max_size=4).map(tuple)
pairs = st.lists(st.tuples(ints, ints), max_size=4).map(tuple)
plans = st.builds(
    StepPlan,
    ints,
    ids,
    st.lists(new, max_size=2).map(tuple),
    triples,
    pairs,
    st.lists(row, max_size=4).map(tuple),
    triples,
)
logprobs = st.lists(st.builds(TokenLogprobs, ids, st.lists(st.floats(-99, 0)).map(tuple), ints), max_size=2).map(tuple)
results = st.builds(
    StepResult, ints, st.lists(st.builds(RowResult, ids, logprobs, logprobs, st.none() | st.text())).map(tuple)
)


@settings(max_examples=200, deadline=None)
@given(plans, results)
def test_what_is_sent_is_what_arrives(plan, result):
    assert wire.to_rank.decode(wire.encode(wire.Step(plan))) == wire.Step(plan)
    assert wire.to_driver.decode(wire.encode(wire.Done(result))) == wire.Done(result)


def await_messages(hub: Hub, count: int) -> list:
    found, deadline = [], time.monotonic() + 5
    while len(found) < count:
        assert time.monotonic() < deadline
        found += hub.poll(0.1)
    return found


@pytest.fixture
def hub():
    made = Hub("127.0.0.1", 2, "secret")
    yield made
    made.close()


def hello(rank: int = 0, token: str = "secret") -> wire.Hello:
    return wire.Hello(token, rank, 1, "here")


def test_messages_of_any_size_in_both_directions(hub):
    line = dial(hub.address, hello())
    assert await_messages(hub, 1) == [(0, hello())]
    long = StepPlan(1, (), (NewSequence(0, tuple(range(500_000)), 9, SamplingParams(), 5, ()),), (), (), ())
    for plan in (long, StepPlan(2, (), (), (), (), ()), StepPlan(3, (), (), (), (), ())):
        hub.broadcast(wire.Step(plan))
    assert line.receive().plan == long
    assert [line.receive().plan.step_id for _ in range(2)] == [2, 3]
    many = [wire.Beat(i, 0.0, False) for i in range(1000)]
    for beat in many:
        line.send(beat)
    assert [message for _, message in await_messages(hub, 1000)] == many
    line.close()
    assert await_messages(hub, 1) == [(0, None)]


@pytest.mark.parametrize(
    "first",
    [
        wire.encode(hello(token="guess")),
        wire.encode(hello(rank=2)),
        wire.encode(wire.Beat(0, 0.0, False)),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x93\xa5Hello\xff",
        b"",
    ],
    ids=["token", "rank", "no hello", "http", "garbage", "nothing"],
)
def test_strangers_are_turned_away_and_disturb_nobody(hub, first):
    with socket.create_connection(hub.address) as stranger:
        stranger.sendall(struct.pack("!I", len(first)) + first)
        stranger.settimeout(3)
        if not first:
            stranger.shutdown(socket.SHUT_WR)
        for _ in range(4):
            assert hub.poll(0.05) == []
        assert stranger.recv(1) == b""
    dial(hub.address, hello()).close()
    assert await_messages(hub, 2) == [(0, hello()), (0, None)]


def test_an_announced_gigabyte_of_a_stranger_is_not_read(hub):
    with socket.create_connection(hub.address) as stranger:
        stranger.sendall(struct.pack("!I", 1 << 30))
        stranger.settimeout(3)
        hub.poll(0.05)
        hub.poll(0.05)
        assert stranger.recv(1) == b""


def test_a_rank_that_does_not_read_holds_nobody_up(hub):
    """It computes: plans wait on the driver's side, and arrive later."""
    line, other = dial(hub.address, hello(0)), dial(hub.address, hello(1))
    await_messages(hub, 2)
    long = NewSequence(0, tuple(range(1_000_000)), 9, SamplingParams(), 5, ())
    started = time.monotonic()
    for step in range(6):
        hub.broadcast(wire.Step(StepPlan(step, (), (long,), (), (), ())))
    assert time.monotonic() - started < 5
    arrived = {}

    def read(each):
        arrived[each] = [each.receive().plan.step_id for _ in range(6)]

    for each in (line, other):
        reader = threading.Thread(target=read, args=(each,))
        reader.start()
        while reader.is_alive():
            hub.poll(0.05)
    assert list(arrived.values()) == [list(range(6))] * 2


def test_a_rank_comes_once(hub):
    first = dial(hub.address, hello())
    second = dial(hub.address, hello())
    assert await_messages(hub, 1) == [(0, hello())]
    for _ in range(4):
        assert hub.poll(0.05) == []
    with pytest.raises(ChannelClosed):
        second.receive()
    first.close()


@pytest.mark.parametrize(
    ("nodes", "layout", "order"),
    [
        ("aaaa", (2, 2), [0, 1, 2, 3]),
        ("abab", (2, 2), [0, 2, 1, 3]),
        ("baba", (2, 2), [1, 3, 0, 2]),
        ("abbba", (2, 2), [0, 4, 1, 2]),  # a bundle more than ranks
        ("abbb", (3, 1), [1, 2, 3]),  # the driver's node has too few
        ("abcab", (2, 2), [0, 3, 1, 4]),
        ("abc", (3, 1), [0, 1, 2]),  # no node has enough
        ("aabbc", (2, 2), [0, 1, 2, 3]),
        ("abbc", (2, 2), [1, 2, 0, 3]),  # one stage whole, one in parts
    ],
)
def test_the_ranks_of_a_stage_share_a_node(nodes, layout, order):
    assert order_bundles(nodes, Layout(*layout), "a") == order
