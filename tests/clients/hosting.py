"""A server on a loopback socket, in this process: any number of models behind one application."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence

import uvicorn

from octavo.cluster.ingress.app import create_app
from octavo.cluster.ingress.client import EngineClient, LocalEngineClient
from octavo.cluster.ingress.service import Service
from octavo.cluster.ingress.settings import IngressSettings
from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.loop import EngineLoop
from octavo.engine.text.byte_tokenizer import ByteTokenizer


def service(names: str, client: EngineClient, **settings) -> Service:
    return Service(IngressSettings(tuple(names.split()), created=1234, **settings), client, ByteTokenizer())


@contextlib.contextmanager
def listening(services: Sequence[Service]) -> Iterator[str]:
    """The application under uvicorn on a port of 127.0.0.1; → its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            create_app(services), log_level="warning", access_log=False, timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(config)
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


@contextlib.contextmanager
def fake_engine(**options) -> Iterator[LocalEngineClient]:
    engine = build_engine(EngineConfig(model="fake", **options))
    loop = None

    def start(on_deltas) -> EngineLoop:
        nonlocal loop
        loop = EngineLoop(engine.core, on_deltas)
        loop.start()
        return loop

    try:
        yield LocalEngineClient(engine.info, start)
    finally:
        if loop is not None:
            loop.stop()
