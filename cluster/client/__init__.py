"""octavo.cluster.client: a typed client of octavo's gRPC endpoint, synchronous and asyncio. No Ray, no torch.

    with Client("host:9000", api_key="secret") as client:
        for chunk in client.stream("Once upon a time", max_tokens=64):
            print(chunk.text, end="")

Errors are octavo's own: RequestError, NotFoundError, CapacityError (with `retry_after_s`), and those of failures.py.
"""

from __future__ import annotations

from octavo.cluster.client.asynchronous import AsyncClient
from octavo.cluster.client.failures import (
    Cancelled,
    DeadlineExceeded,
    ServerFailed,
    Unauthorized,
    Unavailable,
)
from octavo.cluster.client.synchronous import Client
from octavo.cluster.client.values import Candidate, Chunk, Generation, Logprobs, Model, Output, Prompt, Tokens, Usage

__all__ = [
    "AsyncClient",
    "Cancelled",
    "Candidate",
    "Chunk",
    "Client",
    "DeadlineExceeded",
    "Generation",
    "Logprobs",
    "Model",
    "Output",
    "Prompt",
    "ServerFailed",
    "Tokens",
    "Unauthorized",
    "Unavailable",
    "Usage",
]
