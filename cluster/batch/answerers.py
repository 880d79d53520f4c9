"""Who answers the requests of a batch: an engine in this process, or a server that is running.

Both are the server's own HTTP application, with a socket before it or without: whatever path a server has, a batch has.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import httpx

from octavo.cluster.batch.items import Item, Reply
from octavo.cluster.config import DeploymentConfig
from octavo.cluster.ingress_parts import ingress_settings, load_text
from octavo.engine.errors import ConfigError, OctavoError

if TYPE_CHECKING:
    from octavo.cluster.ingress.client import EngineLoop

RETRIED = frozenset({408, 429, 502, 503, 504})
LONGEST_WAIT_S = 30.0
CONNECT_S = 10.0


class Unanswered(OctavoError):
    """Nothing final came of a request: it can be tried again."""


class Unreachable(OctavoError):
    """There is no server, or there is none any more."""


@dataclass(frozen=True, slots=True)
class Answerer:
    """`retries`: how often a request is sent again that was refused for the moment, or whose connection broke."""

    http: httpx.AsyncClient
    retries: int

    async def answer(self, item: Item) -> Reply:
        """Raises Unanswered or Unreachable."""
        attempt = 0
        while True:
            refused: str
            try:
                response = await self.http.post(item.url, json=item.body)
            except httpx.TransportError as error:
                if attempt >= self.retries:
                    raise Unreachable(f"The server does not answer: {type(error).__name__} {error}".rstrip()) from None
                wait_s = _backoff(attempt)
            except (ValueError, httpx.InvalidURL) as error:  # a body that is no JSON, such as one with a NaN
                return Reply(400, "", {"error": {"message": str(error), "type": "invalid_request_error"}})
            else:
                if response.status_code not in RETRIED:
                    return Reply(response.status_code, _id_of(response), _body(response))
                refused = f"status {response.status_code} after {attempt + 1} attempts"
                if attempt >= self.retries:
                    raise Unanswered(refused)
                wait_s = max(_backoff(attempt), _retry_after(response))
            attempt += 1
            await asyncio.sleep(wait_s)


@asynccontextmanager
async def server(url: str, api_key: str | None, retries: int, concurrency: int) -> AsyncIterator[Answerer]:
    """A server at `url`, which may or may not end in /v1. Raises ConfigError if nobody is there."""
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    timeout = httpx.Timeout(None, connect=CONNECT_S)
    async with httpx.AsyncClient(base_url=base, headers=headers, limits=limits, timeout=timeout) as http:
        try:
            await http.get("/v1/models")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ConfigError(f"No server answers at {base}: {type(error).__name__} {error}".rstrip()) from None
        yield Answerer(http, retries)


@asynccontextmanager
async def engine(config: DeploymentConfig) -> AsyncIterator[Answerer]:
    """An engine in this process, of the configuration's first model. Raises ConfigError if it cannot start."""
    app, loop = await asyncio.to_thread(_build, config)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://octavo", timeout=None) as http:
            yield Answerer(http, retries=0)
    finally:
        await asyncio.to_thread(loop.stop)


def _build(config: DeploymentConfig) -> tuple[Any, Any]:
    from octavo.cluster.ingress.app import create_app
    from octavo.cluster.ingress.client import LocalEngineClient
    from octavo.cluster.ingress.service import Service
    from octavo.engine.build import build_engine
    from octavo.engine.loop import EngineLoop as Loop

    model = config.models[0]
    name, tokenizer = load_text(model.engine)
    # A batch waits for its turn however long that takes: nobody else is here.
    settings = replace(ingress_settings(config, model, name), max_queue_wait_s=None, max_ongoing_requests=None)
    built = build_engine(replace(model.engine, max_num_queued_reqs=None))
    loops: list[Loop] = []

    def start(on_deltas: Any) -> EngineLoop:
        loops.append(Loop(built.core, on_deltas))
        loops[0].start()
        return loops[0]

    client = LocalEngineClient(built.info, start)
    return create_app([Service(settings, client, tokenizer)]), loops[0]


def _id_of(response: httpx.Response) -> str:
    """octavo's own header comes first: Ray Serve may send the other one a second time."""
    return str(response.headers.get("request-id") or response.headers.get("x-request-id", ""))


def _body(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return response.text


def _backoff(attempt: int) -> float:
    return float(min(LONGEST_WAIT_S, 0.5 * 2**attempt))


def _retry_after(response: httpx.Response) -> float:
    try:
        seconds = float(response.headers.get("retry-after", "0"))
    except ValueError:
        return 0.0
    return min(LONGEST_WAIT_S, seconds) if math.isfinite(seconds) else 0.0
