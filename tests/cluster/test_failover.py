"""FailoverClient over replicas that die when told to: each is a real core over FakeRunner, without transport."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import pytest
from fakes import INFO, pooled_request, request, until
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.cluster.ingress.client import HandedOver, ReplicaLost
from octavo.cluster.routing import failover
from octavo.cluster.routing.failover import FailoverClient
from octavo.engine.beam import Beams
from octavo.engine.build import assemble
from octavo.engine.config import EngineConfig
from octavo.engine.errors import CapacityError, RequestError
from octavo.engine.runner.fake import FakeRunner
from octavo.engine.types import EngineStats, Request, TokenDelta


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(failover, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(failover, "LONGEST_PAUSE_S", 0.01)


def deltas_of(given: Request) -> list[TokenDelta]:
    """All that an undisturbed engine makes of `given`."""
    core = assemble(EngineConfig(model="fake"), INFO, FakeRunner(INFO.num_blocks, INFO.block_size)).core
    deltas = core.add(given)
    while core.has_work:
        deltas += core.step()
    return deltas


@dataclass
class Replicas:
    """Attempts of which number i ends with `ends[i]`: (after so many deltas, the error); None or no entry: it lives."""

    ends: list[tuple[int, Exception] | None] = field(default_factory=list)
    seen: list[Request] = field(default_factory=list)
    avoided: list[set[str]] = field(default_factory=list)
    live: int = 0
    deaf: int = 0  # how often asking for info meets a replica that dies

    async def info(self):
        self.deaf -= 1
        if self.deaf >= 0:
            raise ReplicaLost("It died.")
        return INFO

    async def stats(self):
        return {"replica": EngineStats()}

    async def attempt(self, request: Request, accepted: Callable[[str], None], within_s=None, avoid=()):
        number = len(self.seen)
        self.seen.append(request)
        self.avoided.append(set(avoid))
        count, error = (self.ends[number] if number < len(self.ends) else None) or (1 << 30, None)
        self.live += 1
        try:
            if count < 0:  # nobody takes it
                if error is None:
                    await asyncio.sleep(within_s)
                    error = ReplicaLost("No replica has taken the request.")
                raise error
            accepted(f"replica-{number}")
            for delta in deltas_of(request)[:count]:
                await asyncio.sleep(0)
                yield delta
            if error is not None:
                raise error
        finally:
            self.live -= 1


async def collect(client, given):
    async with aclosing(client.generate(given)) as deltas:
        return [delta async for delta in deltas]


async def read(client, given, got: list[TokenDelta]) -> ReplicaLost | None:
    try:
        async with aclosing(client.generate(given)) as deltas:
            async for delta in deltas:
                got.append(delta)  # noqa: PERF401 - what came before an error counts
    except ReplicaLost as error:
        return error
    return None


def lost(after: int) -> tuple[int, Exception]:
    return after, ReplicaLost("gone")


async def test_killed_after_every_token():
    given = request(max_tokens=40, logprobs=1, prompt_logprobs=0)
    whole = deltas_of(given)
    for after in range(len(whole)):
        replicas = Replicas([lost(after)])
        resumed: list[None] = []
        client = FailoverClient(replicas, 1.0, lambda to=resumed: to.append(None))
        assert await collect(client, given) == whole
        assert len(resumed) == 1
        assert replicas.avoided == [set(), {"replica-0"}]
        assert replicas.live == 0


async def test_a_search_begins_again_and_tells_only_what_is_missing():
    given = request("r", max_tokens=8, n=3, beams=Beams(4))
    whole = deltas_of(given)
    for count in range(4):
        replicas = Replicas([(count, ReplicaLost("gone"))])
        found = await collect(FailoverClient(replicas, 5), given)
        assert [(d.index, d.token_ids, d.finish_reason) for d in found] == [
            (d.index, d.token_ids, d.finish_reason) for d in whole
        ]


async def test_a_prompt_that_is_pooled_begins_again():
    given = pooled_request(prompt=40, pooling_type="mean")
    (whole,) = deltas_of(given)
    assert whole.pooled
    replicas = Replicas([lost(0), lost(-1)])
    assert await collect(FailoverClient(replicas, 5.0), given) == [whole]
    assert replicas.seen == [given] * 3


async def test_of_several_prompts_only_the_missing_ones_are_pooled_again():
    given = replace(pooled_request(prompt=40, pooling_type="mean"), more_prompts=tuple((97,) * n for n in range(1, 9)))
    whole = deltas_of(given)
    assert len({delta.pooled for delta in whole}) == 9
    replicas = Replicas([lost(4), lost(2)])
    assert await collect(FailoverClient(replicas, 5.0), given) == whole
    assert [len(request.sequences) for request in replicas.seen] == [9, 5, 3]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-1, 60), st.sampled_from([ReplicaLost, HandedOver])), max_size=6),
    st.sampled_from([1, 3]),
    st.booleans(),
)
def test_any_chain_of_losses(ends, n, stops):
    params = {"n": n, "temperature": 1.0, "max_tokens": 30, "logprobs": 1}
    given = request(**params, stop_token_ids=(100, 104) if stops else ())
    whole = deltas_of(given)
    losses = [(after, kind("gone")) for after, kind in ends]
    got: list[TokenDelta] = []
    error = asyncio.run(read(FailoverClient(Replicas(losses), 5.0), given, got))
    assert error is None or "in a row" in str(error)
    for index in range(n):
        # What a sample finds cached depends on whether another one still runs beside it.
        want, have = ([replace(d, num_cached_tokens=0) for d in deltas if d.index == index] for deltas in (whole, got))
        if error is None:
            assert len(have) == len(want)
        tokens = [t for d in have for t in d.token_ids]
        assert tokens == [t for d in want for t in d.token_ids][: len(tokens)]
        assert have == want[: len(have)]


async def test_a_replica_that_dies_while_it_says_what_it_is():
    assert await FailoverClient(Replicas(deaf=2), 5.0).info() == INFO
    with pytest.raises(ReplicaLost):
        await FailoverClient(Replicas(deaf=99), 5.0).info()


async def test_poison_is_not_tried_for_ever():
    replicas = Replicas([lost(0)] * 9)
    with pytest.raises(ReplicaLost, match="3 replicas in a row"):
        await collect(FailoverClient(replicas, 5.0), request())
    assert len(replicas.seen) == 3
    assert replicas.live == 0


async def test_losses_between_which_it_gets_on_are_nobody_s_fault():
    replicas = Replicas([lost(40)] * 9)
    given = request(max_tokens=400)
    assert await collect(FailoverClient(replicas, 5.0), given) == deltas_of(given)
    assert len(replicas.seen) == 10


async def test_handing_over_is_no_loss():
    replicas = Replicas([(2, HandedOver("stops"))] * 9)
    given = request(max_tokens=30)
    assert await collect(FailoverClient(replicas, 5.0), given) == deltas_of(given)


async def test_without_a_replica_it_waits_until_its_time_is_over():
    replicas = Replicas([lost(3), *[(-1, None)] * 99])
    started = asyncio.get_running_loop().time()
    got: list[TokenDelta] = []
    error = await read(FailoverClient(replicas, 0.3), request(), got)
    assert "for 0.3 s no other" in str(error)
    assert 0.25 < asyncio.get_running_loop().time() - started < 1.0
    assert len(got) == 3


async def test_when_none_will_come_it_says_so_at_once():
    replicas = Replicas([(3, HandedOver("stops"))])
    got: list[TokenDelta] = []
    error = await read(FailoverClient(replicas, 60.0, is_hopeless=lambda: True), request(), got)
    assert "stopping" in str(error)
    assert (len(got), len(replicas.seen)) == (3, 1)


async def test_one_that_comes_in_time_takes_over():
    replicas = Replicas([lost(3), *[(-1, ReplicaLost("cannot be reached"))] * 5])
    assert await collect(FailoverClient(replicas, 5.0), request()) == deltas_of(request())
    assert len(replicas.seen) == 7


async def test_full_queues_are_waited_out_once_it_has_begun():
    full = (-1, CapacityError("full"))
    with pytest.raises(CapacityError):
        await collect(FailoverClient(Replicas([full]), 5.0), request())
    replicas = Replicas([lost(3), full, full])
    resumed: list[None] = []
    client = FailoverClient(replicas, 5.0, lambda: resumed.append(None))
    assert await collect(client, request()) == deltas_of(request())
    assert len(resumed) == 1
    with pytest.raises(ReplicaLost, match="no other"):
        await collect(FailoverClient(Replicas([lost(3), *[full] * 999]), 0.1), request())


async def test_the_client_s_errors_are_not_tried_again():
    replicas = Replicas([(-1, RequestError("no", "prompt"))])
    with pytest.raises(RequestError):
        await collect(FailoverClient(replicas, 5.0), request())
    assert len(replicas.seen) == 1


async def test_closing_it_ends_the_attempt_wherever_it_is():
    replicas = Replicas([lost(1)])
    stream = FailoverClient(replicas, 5.0).generate(request())
    for _ in range(4):
        await anext(stream)
    assert replicas.live == 1
    await stream.aclose()
    assert replicas.live == 0
    waiting = Replicas([lost(1), (-1, None)])
    task = asyncio.create_task(collect(FailoverClient(waiting, 60.0), request()))
    await until(lambda: len(waiting.seen) == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert waiting.live == 0


async def test_what_was_cached_first_is_what_is_told():
    class Cached(Replicas):
        async def attempt(self, *args, **kwargs):
            cached = 16 * len(self.seen)
            async for delta in super().attempt(*args, **kwargs):
                yield replace(delta, num_cached_tokens=cached)

    deltas = await collect(FailoverClient(Cached([lost(2)]), 5.0), request())
    assert {delta.num_cached_tokens for delta in deltas} == {0}
