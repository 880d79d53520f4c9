"""The shapes of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from octavo.cluster.ingress import replies
from octavo.cluster.ingress.errors import Failure
from octavo.cluster.ingress.generation import Generation, Piece, join
from octavo.cluster.ingress.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from octavo.cluster.ingress.protocol import ChatBody
from octavo.cluster.ingress.reading.parts import Answer, CallArguments, CallBegun, Part, Reasoning


class ChatDialect:
    form = replies.DATA_EVENTS

    def __init__(
        self,
        body: ChatBody,
        generation: Generation,
        names: TokenNames,
        *,
        answer_id: str,
        model: str,
        created: int,
        prompt_text: str | None = None,
    ) -> None:
        """prompt_text: what the model got, for a client that wants to see it."""
        self._prompt_text = prompt_text
        self._body = body
        self._generation = generation
        self._names = names
        self._answer_id = answer_id
        self._model = model
        self._created = created
        options = body.stream_options
        self._usage_null = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        self._calling: set[int] = set()  # choices in which the model has called a tool
        choice = body.function_call if body.functions else body.tool_choice
        self._is_named = choice is not None and choice.mode == "named"
        # echo gives back what the answer continues, so that the client has the turn as one text
        self._echo = body.messages[-1].text if body.echo and body.continue_final_message else ""

    def opening(self) -> Iterable[dict[str, Any]]:
        for index in range(len(self._generation.choices)):
            chunk = self._chunk(index, {"role": "assistant", "content": self._echo})
            if self._prompt_text is not None and index == 0:
                chunk["prompt_text"] = self._prompt_text
            yield chunk

    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]:
        parts = self._read(piece)
        if parts or piece.logprobs or (self._body.return_token_ids and piece.token_ids):
            chunk = self._chunk(piece.index, _delta(parts, bool(self._body.functions)))
            choice = chunk["choices"][0]
            choice["logprobs"] = self._logprobs(piece)
            if self._body.return_token_ids:
                choice["token_ids"] = list(piece.token_ids)
                if piece.first:
                    chunk["prompt_token_ids"] = list(self._generation.prompts[0].token_ids)
            yield chunk
        if piece.finish_reason is not None:
            chunk = self._chunk(piece.index, {})
            chunk["choices"][0].update(finish_reason=self._finish_reason(piece), stop_reason=piece.stop_reason)
            yield chunk

    def closing(self, usage: dict[str, Any]) -> Iterable[dict[str, Any]]:
        return ({**self._head("chat.completion.chunk"), "choices": [], "usage": usage},) if self._usage_null else ()

    def failed(self, failure: Failure) -> Iterable[dict[str, Any]]:
        return (failure.body,)

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: dict[str, Any]) -> dict[str, Any]:
        reply = {
            **self._head("chat.completion"),
            "choices": [self._choice(join(some)) for some in pieces],
            "usage": usage,
        }
        if self._body.return_token_ids:
            reply["prompt_token_ids"] = list(self._generation.prompts[0].token_ids)
        if self._prompt_text is not None:
            reply["prompt_text"] = self._prompt_text
        if self._body.prompt_logprobs is not None:
            reply["prompt_logprobs"] = prompt_logprobs(self._generation.prompt_logprobs[0], self._names)
        return reply

    def _choice(self, piece: Piece) -> dict[str, Any]:
        message = _message(_delta(self._read(piece), bool(self._body.functions)), self._echo)
        choice: dict[str, Any] = {
            "index": piece.index,
            "message": message,
            "logprobs": self._logprobs(piece),
            "finish_reason": self._finish_reason(piece),
            "stop_reason": piece.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = list(piece.token_ids)
        return choice

    def _read(self, piece: Piece) -> list[Part]:
        parts = self._generation.readers[piece.index].push(piece.text, piece.finish_reason is not None)
        if any(isinstance(part, CallBegun) for part in parts):
            self._calling.add(piece.index)
        return parts

    def _finish_reason(self, piece: Piece) -> str | None:
        """After its piece was read. Where the client has named the tool, it is "stop", as OpenAI has it."""
        if piece.finish_reason != "stop" or piece.index not in self._calling or self._is_named:
            return piece.finish_reason
        return "function_call" if self._body.functions else "tool_calls"

    def _chunk(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self._usage_always:
            chunk["usage"] = self._generation.usage()
        elif self._usage_null:
            chunk["usage"] = None
        return chunk

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        as_ids = bool(self._body.return_tokens_as_token_ids)
        top = len(self._body.logprob_token_ids or ()) or self._body.top_logprobs or 0
        return chat_logprobs(piece.logprobs, top, self._names, as_ids)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._answer_id, "object": kind, "created": self._created, "model": self._model}


def _delta(parts: Sequence[Part], as_function: bool) -> dict[str, Any]:
    """What a chunk adds. Without any part, an empty text: the chunk carries something else.

    as_function: a call in the form that goes with the old `functions`, where there is one at most.
    """
    delta: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        match part:
            case Answer(text):
                delta["content"] = delta.get("content", "") + text
            case Reasoning(text):
                # under the name that DeepSeek gave it, and vLLM's
                delta["reasoning_content"] = delta["reasoning"] = delta.get("reasoning", "") + text
            case CallBegun(index, call_id, name):
                function = {"name": name, "arguments": ""}
                calls[index] = {"index": index, "id": call_id, "type": "function", "function": function}
            case CallArguments(index, text):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += text
    if calls and as_function:
        delta["function_call"] = calls[0]["function"]
    elif calls:
        delta["tool_calls"] = list(calls.values())
    return delta or {"content": ""}


def _message(delta: dict[str, Any], echo: str) -> dict[str, Any]:
    """The whole answer. As OpenAI has it, content is null where the model has only called tools."""
    content: str | None = echo + delta.pop("content", "")
    if calls := delta.get("tool_calls"):
        delta["tool_calls"] = [{key: value for key, value in call.items() if key != "index"} for call in calls]
    if "tool_calls" in delta or "function_call" in delta:
        content = content or None
    return {"role": "assistant", "content": content, "refusal": None, **delta}
