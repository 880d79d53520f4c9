"""What the cluster's tests share: an engine without a model, and a Serve handle without Serve."""

import asyncio
import time
from collections.abc import Callable

from octavo.cluster.replica import EngineReplica, Host
from octavo.cluster.routing.client import ServeEngineClient
from octavo.cluster.token_receiver import TokenReceiver
from octavo.engine.build import assemble
from octavo.engine.config import EngineConfig
from octavo.engine.errors import RankLost
from octavo.engine.loop import EngineLoop
from octavo.engine.params import SamplingParams
from octavo.engine.pooling.info import PoolingInfo
from octavo.engine.pooling.params import PoolingParams
from octavo.engine.pooling.prompts import pooling_request
from octavo.engine.runner.fake import FAKE_EMBEDDING, CostModel, FakeRunner
from octavo.engine.types import EngineInfo, Request

POOLING = PoolingInfo(embedding_size=FAKE_EMBEDDING)
INFO = EngineInfo("fake", 2048, 258, (257,), "none", "none", 16, 1024, phases=(("build", 0.25),), pooling=POOLING)


def fake_loop(on_deltas: Callable, *, step_s: float = 0.001, **options) -> EngineLoop:
    """A real core and loop over FakeRunner, `step_s` seconds a step."""
    config = EngineConfig(model="fake", **options)
    runner = FakeRunner(INFO.num_blocks, INFO.block_size, cost=CostModel(step_s=step_s))
    return EngineLoop(assemble(config, INFO, runner).core, on_deltas)


def fake_replica(
    name: str = "replica-1", step_timeout_s: float = 60.0, host: Host | None = None, **options
) -> EngineReplica:
    return EngineReplica(name, INFO, lambda on_deltas: fake_loop(on_deltas, **options), step_timeout_s, host)


def request(request_id: str = "r", prompt: int = 8, max_tokens: int = 10, **params) -> Request:
    given = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **{"temperature": 0.0, "seed": 1, **params})
    return Request(request_id, tuple(range(97, 97 + prompt)), given)


def pooled_request(request_id: str = "r", prompt: int = 8, **params) -> Request:
    ids = tuple(range(97, 97 + prompt))
    return pooling_request(request_id, [ids], POOLING.resolve(PoolingParams(**params)), arrival_time=0.0)


class FakeHandle:
    """A Serve handle to one replica in this process: each call is a task; cancelling the response cancels it."""

    def __init__(self, replica: EngineReplica) -> None:
        self.replica = replica
        self.calls: list[asyncio.Task] = []

    def forget_calls(self) -> None:
        """What the calls so far bring never comes."""
        for call in self.calls:
            call.muted = True

    def __getattr__(self, method: str) -> "_Method":
        return _Method(self, method)

    def broadcast(self, method: str) -> "_Results":
        return _Results([getattr(self.replica, method)()])


class _Result:
    def __init__(self, value) -> None:
        self.value = value

    async def get_async(self):
        return self.value


class _Method:
    def __init__(self, handle: FakeHandle, name: str) -> None:
        self.handle, self.name = handle, name

    def remote(self, *args) -> "_Call":
        async def run():
            result = getattr(self.handle.replica, self.name)(*args)
            return await result if asyncio.iscoroutine(result) else result

        call = _Call(asyncio.ensure_future(run()))
        self.handle.calls.append(call)
        return call


class _Call:
    def __init__(self, task: asyncio.Task) -> None:
        self.task = task
        self.muted = False

    def __await__(self):
        return self._result().__await__()

    def cancel(self) -> None:
        self.task.cancel()

    async def _result(self):
        result = await self.task
        if self.muted:
            await asyncio.Event().wait()
        return result


class _Results:
    def __init__(self, values: list) -> None:
        self.values = values

    async def _fetch_replica_results_async(self) -> list:
        return [_Result(value) for value in self.values]


async def local_client(replica: EngineReplica) -> tuple[ServeEngineClient, TokenReceiver]:
    receiver = TokenReceiver()
    await receiver.start("127.0.0.1")
    return ServeEngineClient(FakeHandle(replica), receiver), receiver


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for `condition`; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


def fragile(host: type) -> type:
    """The Serve deployment's class with a way to break its engine."""

    class EngineHost(host):
        def break_engine(self) -> None:
            def launch(plan):
                raise RankLost("Rank 3 on node 10.0.0.3 was killed (signal 9).")

            self._loop.core.process.launch = launch

    return EngineHost
