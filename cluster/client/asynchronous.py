"""AsyncClient: octavo's gRPC endpoint for asyncio."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from octavo.cluster.client import values
from octavo.cluster.client.failures import ServerFailed
from octavo.cluster.client.requests import Params, Prompt, generation_request, tokenize_request
from octavo.cluster.client.synchronous import CHANNEL_OPTIONS, authorization, translated
from octavo.protos.octavo.v1 import inference_pb2 as pb
from octavo.protos.octavo.v1 import inference_pb2_grpc


class AsyncClient:
    """What Client is, for one event loop, to be made on it. Cancelling a task that waits here cancels its call."""

    def __init__(
        self,
        target: str,
        *,
        api_key: str | None = None,
        timeout_s: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, CHANNEL_OPTIONS)
        self._stub: Any = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._timeout_s = timeout_s
        self._metadata = authorization(api_key)

    async def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **params: Unpack[Params]
    ) -> values.Generation:
        """The whole answer. Raises OctavoError: see octavo.cluster.client."""
        request = generation_request(prompt, params)
        return values.generation(await self._call(self._stub.GenerateUnary, request, timeout_s))

    async def stream(
        self, prompt: Prompt, *, timeout_s: float | None = None, **params: Unpack[Params]
    ) -> AsyncGenerator[values.Chunk, None]:
        """The answer as it comes; closing the generator (`aclose`) cancels the call. Raises OctavoError."""
        request = generation_request(prompt, params)
        with translated():
            call = self._stub.Generate(request, timeout=timeout_s or self._timeout_s, metadata=self._metadata)
            try:
                complete = False
                async for proto in call:
                    chunk = values.chunk(proto)
                    if chunk.outputs:
                        complete = chunk.usage is not None
                        yield chunk
                if not complete:
                    raise ServerFailed("The stream ended before the answer did.")
            finally:
                call.cancel()

    async def tokenize(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        model: str | None = None,
        add_special_tokens: bool | None = None,
        texts: bool = False,
        timeout_s: float | None = None,
    ) -> values.Tokens:
        """`texts`: the text of each token too."""
        request = tokenize_request(prompt, model, add_special_tokens, texts)
        return values.tokens(await self._call(self._stub.Tokenize, request, timeout_s))

    async def models(self, *, timeout_s: float | None = None) -> list[values.Model]:
        return values.models(await self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout_s))

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        with translated():
            return await method(request, timeout=timeout_s or self._timeout_s, metadata=self._metadata)
