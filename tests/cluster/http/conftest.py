"""The HTTP side with a scripted engine: what it answers is known beforehand, and what it was asked is kept."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

import httpx
import pytest
import uvicorn

from octavo.cluster.ingress.app import create_app
from octavo.cluster.ingress.service import Service
from octavo.cluster.ingress.settings import IngressSettings
from octavo.engine.text.byte_tokenizer import EOS, ByteTokenizer
from octavo.engine.types import EngineInfo, EngineStats, Request, TokenDelta, TokenLogprobs

INFO = EngineInfo(
    model="scripted",
    max_model_len=512,
    vocab_size=261,
    eos_token_ids=(EOS,),
    dtype="none",
    device="none",
    block_size=16,
    num_blocks=64,
)


def logprobs_of(token: int, top: int) -> TokenLogprobs:
    """The drawn token is the second likeliest: -1.0; the others are -0.5, -1.5, -2.5 …"""
    others = [(token + 1) % 256, token, *((token + 2 + i) % 256 for i in range(20))]
    values = [-0.5, -1.0, *(-1.5 - i for i in range(20))]
    return TokenLogprobs((token, *others[:top]), (-1.0, *values[:top]), 2)


@dataclass
class ScriptedClient:
    """EngineClient whose sequence i answers `replies[i % len]`, `step` bytes a time, and ends. No clock, no threads."""

    replies: tuple[str, ...] = ("Hello, world",)
    step: int = 1
    delay_s: float = 0.0
    fail: BaseException | None = None  # raised instead of the first delta
    fail_after: tuple[int, BaseException | TokenDelta] | None = None  # instead of the delta of that number
    reply_of: Callable[[Request], str] | None = None
    hang_after: int | None = None  # tokens after which nothing comes any more
    info_value: EngineInfo = INFO
    stats_value: list[EngineStats] = field(default_factory=lambda: [EngineStats(num_running=1, generation_tokens=1)])
    seen: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    live: int = 0

    async def info(self) -> EngineInfo:
        return self.info_value

    async def stats(self) -> list[EngineStats]:
        return self.stats_value

    async def generate(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        self.seen.append(request)
        self.live += 1
        finished = False
        try:
            if self.fail is not None:
                raise self.fail
            scripts = [self._script(request, index) for index in range(request.params.n)]
            number = 0
            while scripts:
                for script in list(scripts):
                    await asyncio.sleep(self.delay_s)
                    if self.hang_after is not None and number >= self.hang_after:
                        await asyncio.Event().wait()
                    if self.fail_after is not None and number >= self.fail_after[0]:
                        if isinstance(self.fail_after[1], BaseException):
                            raise self.fail_after[1]
                        yield self.fail_after[1]
                    number += 1
                    delta = script.pop(0)
                    if not script:
                        scripts.remove(script)
                    finished = not scripts
                    yield delta
        finally:
            self.live -= 1
            if not finished:
                self.aborted.append(request.request_id)

    def _script(self, request: Request, index: int) -> list[TokenDelta]:
        params = request.params
        reply = self.reply_of(request) if self.reply_of else self.replies[index % len(self.replies)]
        tokens = [*ByteTokenizer().encode(reply, add_special_tokens=False), EOS]
        assert params.max_tokens is not None
        reason = "stop" if len(tokens) <= params.max_tokens else "length"
        tokens = tokens[: params.max_tokens]
        deltas = []
        for at in range(0, len(tokens), self.step):
            some = tuple(tokens[at : at + self.step])
            last = at + self.step >= len(tokens)
            prompt_logprobs = None
            if at == index == 0 and params.prompt_logprobs is not None:
                rest = [logprobs_of(token, params.prompt_logprobs) for token in request.prompt_token_ids[1:]]
                prompt_logprobs = (None, *rest)
            deltas.append(
                TokenDelta(
                    request.request_id,
                    index,
                    some,
                    () if params.logprobs is None else tuple(logprobs_of(token, params.logprobs) for token in some),
                    reason if last else None,
                    num_cached_tokens=3,
                    prompt_logprobs=prompt_logprobs,
                )
            )
        return deltas


SETTINGS = {"served_model_names": ("scripted", "other-name"), "created": 1234}


@contextlib.asynccontextmanager
async def without_socket(client, **settings):
    """An httpx client that talks to the application directly."""
    app = create_app([Service(IngressSettings(**{**SETTINGS, **settings}), client, ByteTokenizer())])
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as http:
        yield http


@contextlib.contextmanager
def listening(client, send_buffer=None, **settings):
    """The application under uvicorn on a port of 127.0.0.1; → its URL."""
    app = create_app([Service(IngressSettings(**{**SETTINGS, **settings}), client, ByteTokenizer())])
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
