"""The HTTP side with a scripted engine."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable

import httpx
import pytest
import uvicorn
from scripted import INFO, ScriptedClient, logprobs_of

from octavo.cluster.ingress.app import create_app
from octavo.cluster.ingress.service import Service
from octavo.cluster.ingress.settings import IngressSettings
from octavo.engine.text.byte_tokenizer import ByteTokenizer

SETTINGS = {"served_model_names": ("scripted", "other-name"), "created": 1234}


def application(client, **settings):
    return create_app([Service(IngressSettings(**{**SETTINGS, **settings}), client, ByteTokenizer())])


@contextlib.asynccontextmanager
async def without_socket(client, **settings):
    """An httpx client that talks to the application directly."""
    transport = httpx.ASGITransport(application(client, **settings), raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as http:
        yield http


@contextlib.contextmanager
def listening(client, send_buffer=None, **settings):
    """The application under uvicorn on a port of 127.0.0.1; → its URL."""
    app = application(client, **settings)
    listener = socket.socket()
    if send_buffer is not None:  # the accepted sockets get it too
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()


@pytest.fixture(scope="session")
def harness():
    """What the tests of this folder share: the scripted engine and two ways to reach it."""

    class Harness:
        Client = ScriptedClient
        info = INFO
        logprobs_of = staticmethod(logprobs_of)
        app = staticmethod(application)
        http = staticmethod(without_socket)
        server = staticmethod(listening)
        events = staticmethod(events)
        eventually = staticmethod(eventually)

    return Harness


def events(text: str) -> list[str]:
    """The data of a stream's events, `[DONE]` included."""
    assert text.endswith("\n\n"), text[-100:]
    blocks = text.removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") for block in blocks), blocks
    return [block.removeprefix("data: ") for block in blocks]


async def eventually(condition: Callable[[], bool], within_s: float = 2.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)
