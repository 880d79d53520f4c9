"""What a generation brings, in gRPC's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo.cluster.ingress.generation import Generation, Piece
from octavo.cluster.ingress.grpc.bodies import has_text
from octavo.cluster.ingress.logprobs import TokenNames
from octavo.engine.types import TokenLogprobs
from octavo.protos.octavo.v1 import inference_pb2

_REASONS = {
    None: inference_pb2.Output.FINISH_REASON_UNSPECIFIED,
    "stop": inference_pb2.Output.FINISH_REASON_STOP,
    "length": inference_pb2.Output.FINISH_REASON_LENGTH,
}


class Writer:
    """The messages that answer one GenerationRequest; `chunk` is called with its pieces in order, `whole` once."""

    def __init__(self, request: Any, generation: Generation, names: TokenNames, answer_id: str, model: str) -> None:
        self._request = request
        self._generation = generation
        self._names = names
        self._id, self._model = answer_id, model
        self._text = has_text(request)
        self._first = True
        self._unfinished = len(generation.choices)

    def chunk(self, piece: Piece) -> Any:
        chunk = inference_pb2.GenerationChunk(outputs=(self._output(piece),))
        if self._first:
            self._first = False
            chunk.id, chunk.model = self._id, self._model
            self._add_prompt(chunk)
        if piece.finish_reason is not None:
            self._unfinished -= 1
            if not self._unfinished:
                chunk.usage.CopyFrom(self._usage())
        return chunk

    def whole(self, pieces: Sequence[Piece]) -> Any:
        """`pieces[i]` is all of sequence i."""
        outputs = [self._output(piece) for piece in pieces]
        response = inference_pb2.GenerationResponse(
            id=self._id, model=self._model, outputs=outputs, usage=self._usage()
        )
        self._add_prompt(response)
        return response

    def _output(self, piece: Piece) -> Any:
        output = inference_pb2.Output(index=piece.index, finish_reason=_REASONS[piece.finish_reason])
        if self._text:
            output.text = piece.text
        if self._request.return_token_ids:
            output.token_ids.extend(piece.token_ids)
        if piece.logprobs:
            params = self._request.params
            top = len(params.logprob_token_ids) or params.logprobs
            output.logprobs.extend(self._logprobs(entry, top) for entry in piece.logprobs)
        if isinstance(piece.stop_reason, int):
            output.stop_token_id = piece.stop_reason
        elif piece.stop_reason is not None:
            output.stop_string = piece.stop_reason
        return output

    def _add_prompt(self, message: Any) -> None:
        (ids,) = (prompt.token_ids for prompt in self._generation.prompts)
        if self._request.return_prompt_token_ids:
            message.prompt.token_ids.extend(ids)
        if self._request.params.HasField("prompt_logprobs"):
            top = self._request.params.prompt_logprobs
            (entries,) = self._generation.prompt_logprobs
            nothing = inference_pb2.Logprobs()
            message.prompt.logprobs.extend(
                nothing if entry is None else self._logprobs(entry, top) for entry in entries
            )

    def _logprobs(self, entry: TokenLogprobs, top: int) -> Any:
        drawn, *best = (
            inference_pb2.Logprobs.Candidate(token_id=token, logprob=logprob, rank=rank, text=self._names.text(token))
            for rank, (token, logprob) in enumerate(zip(entry.token_ids, entry.logprobs, strict=True))
        )
        drawn.rank = entry.rank  # its own; the others follow in descending order from rank 1
        return inference_pb2.Logprobs(token=drawn, top=best[:top])

    def _usage(self) -> Any:
        generation = self._generation
        return inference_pb2.Usage(
            prompt_tokens=generation.num_prompt_tokens,
            completion_tokens=generation.num_completion_tokens,
            cached_tokens=generation.num_cached_tokens,
        )
