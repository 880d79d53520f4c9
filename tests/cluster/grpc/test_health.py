"""grpc.health.v1 and the two small methods of Inference."""

import asyncio

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest

from octavo.engine.types import EngineStats
from octavo.protos.octavo.v1 import inference_pb2 as pb

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
READY = [EngineStats(generation_tokens=1)]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr("octavo.cluster.ingress.grpc.health.FRESH_S", 0.02)


async def test_check_and_list(harness):
    well, ill = harness.Client(stats_value=READY), harness.Client(stats_value=[])
    async with harness.serving(well, ill, api_keys=("k",)) as server:  # probes have no key

        async def check(service):
            return (await server.health.Check(HealthCheckRequest(service=service))).status

        names = ("scripted", "other-name", "second", "", "octavo.v1.Inference")
        assert [await check(name) for name in names] == [SERVING, SERVING] + [NOT_SERVING] * 3
        ill.stats_value = READY
        await asyncio.sleep(0.03)
        assert [await check(name) for name in names] == [SERVING] * 5
        listed = (await server.health.List(HealthListRequest())).statuses
        assert {name: entry.status for name, entry in listed.items()} == dict.fromkeys(names, SERVING)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check("nobody")
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_watch_tells_changes_and_ends_with_the_ingress(harness):
    engine, stops = harness.Client(stats_value=[]), []
    async with harness.serving(engine, draining=lambda: bool(stops)) as server:
        watch = server.health.Watch(HealthCheckRequest()).__aiter__()
        assert (await anext(watch)).status == NOT_SERVING
        engine.stats_value = READY
        assert (await anext(watch)).status == SERVING
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(later := asyncio.ensure_future(anext(watch))), 0.1)
        stops.append(True)
        assert (await later).status == NOT_SERVING
        with pytest.raises(StopAsyncIteration):
            await anext(watch)
        unknown = server.health.Watch(HealthCheckRequest(service="nobody")).__aiter__()
        assert (await anext(unknown)).status == HealthCheckResponse.SERVICE_UNKNOWN


async def test_tokenize_and_models(harness):
    async with harness.serving(harness.Client(), chat_template="{{messages[0].content}}{{mark}}") as server:
        found = await server.stub.Tokenize(pb.TokenizeRequest(text="Hi!", return_token_texts=True))
        assert (list(found.token_texts)[-3:], found.max_model_len) == (["H", "i", "!"], 512)
        plain = await server.stub.Tokenize(pb.TokenizeRequest(text="Hi!", add_special_tokens=False))
        assert list(plain.token_ids) == list(b"Hi!")
        assert not plain.token_texts
        chat = pb.Conversation(messages=[{"role": "user", "content": "Hi"}])
        chat.chat_template_kwargs.update({"mark": 3})
        told = await server.stub.Tokenize(pb.TokenizeRequest(chat=chat))
        assert bytes(told.token_ids) == b"Hi3"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.stub.Tokenize(pb.TokenizeRequest())
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        models = (await server.stub.ListModels(pb.ListModelsRequest())).models
        assert [(model.name, model.max_model_len, model.created) for model in models] == [
            ("scripted", 512, 1234),
            ("other-name", 512, 1234),
        ]
