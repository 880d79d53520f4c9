"""The gRPC side with a scripted engine, on a gRPC server that treats the servicer as Serve's direct ingress does."""

import contextlib
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1.health_pb2_grpc import HealthStub, add_HealthServicer_to_server
from ray.serve.grpc_util import RayServegRPCContext
from scripted import INFO, ScriptedClient

from octavo.cluster.client import AsyncClient
from octavo.cluster.ingress.catalog import Catalog
from octavo.cluster.ingress.grpc.health import Health
from octavo.cluster.ingress.grpc.register import add_inference
from octavo.cluster.ingress.grpc.servicer import Servicer
from octavo.cluster.ingress.service import Service
from octavo.cluster.ingress.settings import IngressSettings
from octavo.engine.text.byte_tokenizer import ByteTokenizer
from octavo.protos.octavo.v1.inference_pb2_grpc import InferenceStub

SETTINGS = {"served_model_names": ("scripted", "other-name"), "created": 1234}


def direct_unary(method):
    """What ray/serve/_private/replica.py does around a method of the deployment, with nothing that logs or counts."""

    async def handler(request, context):
        given = RayServegRPCContext(context)
        answer = await method(request, given)
        given._set_on_grpc_context(context)
        return answer

    return handler


def direct_stream(method):
    async def handler(request, context):
        given = RayServegRPCContext(context)
        async for message in method(request, given):
            yield message.SerializeToString()
        given._set_on_grpc_context(context)

    return handler


def in_bytes(handler):
    async def serialized(request, context):
        return (await handler(request, context)).SerializeToString()

    return serialized


@contextlib.asynccontextmanager
async def serving(
    *clients, through_handle=False, draining=lambda: False, health_fresh_s=0.01, api_key=None, **settings
):
    """A server of one model per engine client. → its address, raw stubs, and octavo's client for it."""
    names = (SETTINGS["served_model_names"], ("second",))
    services = [
        Service(
            IngressSettings(**{**SETTINGS, "served_model_names": names[number], **settings}), client, ByteTokenizer()
        )
        for number, client in enumerate(clients)
    ]
    catalog = Catalog(services)
    servicer, health = Servicer(catalog, lambda: through_handle), Health(catalog, draining)
    server = grpc.aio.server()
    inference = SimpleNamespace(
        Generate=direct_stream(servicer.generate),
        GenerateUnary=in_bytes(direct_unary(servicer.generate_unary)),
        Tokenize=in_bytes(direct_unary(servicer.tokenize)),
        ListModels=in_bytes(direct_unary(servicer.list_models)),
    )
    add_inference(inference, server)

    async def watch(request, context):
        async for status in health.watch(request, RayServegRPCContext(context)):
            yield status

    add_HealthServicer_to_server(
        SimpleNamespace(Check=direct_unary(health.check), List=direct_unary(health.list), Watch=watch), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    address = f"127.0.0.1:{port}"
    try:
        async with grpc.aio.insecure_channel(address) as channel, AsyncClient(address, api_key=api_key) as client:
            yield SimpleNamespace(
                address=address,
                channel=channel,
                stub=InferenceStub(channel),
                health=HealthStub(channel),
                client=client,
                services=services,
            )
    finally:
        await server.stop(0)


@pytest.fixture(scope="session")
def harness():
    return SimpleNamespace(Client=ScriptedClient, info=INFO, serving=serving)
