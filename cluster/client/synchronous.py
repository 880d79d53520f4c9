"""Client: octavo's gRPC endpoint for code that waits."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from octavo.cluster.client import values
from octavo.cluster.client.failures import ServerFailed, exception
from octavo.cluster.client.requests import Params, Prompt, generation_request, tokenize_request
from octavo.protos.octavo.v1 import inference_pb2 as pb
from octavo.protos.octavo.v1 import inference_pb2_grpc

# As the server: prompts and logprobs can be long.
CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


class Client:
    """`target`: host:port. `timeout_s`: deadline of each call that says none; None = no deadline. `credentials`: for
    TLS, where something in front of the server speaks it. Thread-safe. Closing it cancels its calls.

    A prompt is a text, token ids, or a conversation: a sequence of {"role": …, "content": …}.
    """

    def __init__(
        self,
        target: str,
        *,
        api_key: str | None = None,
        timeout_s: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        if credentials is None:
            self._channel = grpc.insecure_channel(target, CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, credentials, CHANNEL_OPTIONS)
        self._stub: Any = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._timeout_s = timeout_s
        self._metadata = authorization(api_key)

    def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **params: Unpack[Params]
    ) -> values.Generation:
        """The whole answer. Raises OctavoError: see octavo.cluster.client."""
        return values.generation(self._call(self._stub.GenerateUnary, generation_request(prompt, params), timeout_s))

    def stream(
        self, prompt: Prompt, *, timeout_s: float | None = None, **params: Unpack[Params]
    ) -> Generator[values.Chunk, None, None]:
        """The answer as it comes; closing the iterator, or dropping it, cancels the call. The deadline is the whole
        answer's. Raises OctavoError, at the first `next` at the earliest.
        """
        request = generation_request(prompt, params)
        with translated():
            call = self._stub.Generate(request, timeout=timeout_s or self._timeout_s, metadata=self._metadata)
            try:
                complete = False
                for proto in call:
                    chunk = values.chunk(proto)
                    if chunk.outputs:
                        complete = chunk.usage is not None
                        yield chunk
                if not complete:
                    raise ServerFailed("The stream ended before the answer did.")
            finally:
                call.cancel()

    def tokenize(
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
        return values.tokens(self._call(self._stub.Tokenize, request, timeout_s))

    def models(self, *, timeout_s: float | None = None) -> list[values.Model]:
        return values.models(self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout_s))

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        with translated():
            return method(request, timeout=timeout_s or self._timeout_s, metadata=self._metadata)


@contextmanager
def translated() -> Iterator[None]:
    """gRPC's errors as octavo's."""
    try:
        yield
    except grpc.RpcError as error:
        raise exception(error) from None


def authorization(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)
