"""The shapes of /v1/responses: the response around its output, and the course of a stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from octavo.cluster.ingress import replies
from octavo.cluster.ingress.errors import Failure
from octavo.cluster.ingress.generation import Generation, Piece
from octavo.cluster.ingress.logprobs import TokenNames
from octavo.cluster.ingress.responses.body import ResponsesBody
from octavo.cluster.ingress.responses.output import Output


class ResponsesDialect:
    """`keep` is given the response when the model has ended it."""

    form = replies.NAMED_EVENTS

    def __init__(
        self,
        body: ResponsesBody,
        generation: Generation,
        names: TokenNames,
        *,
        answer_id: str,
        model: str,
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        self._generation = generation
        self._keep = keep
        self._head = _head(body, generation, answer_id, model)
        self._output = Output(
            generation.readers[0], names, as_summary=body.shows_summary, top_logprobs=body.top_logprobs or 0
        )
        self._num_events = 0

    def opening(self) -> Iterable[dict[str, Any]]:
        response = {**self._head, "status": "in_progress"}
        yield self._numbered({"type": "response.created", "response": response})
        yield self._numbered({"type": "response.in_progress", "response": response})

    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]:
        return [self._numbered(event) for event in self._output.events(piece)]

    def closing(self, usage: dict[str, Any]) -> Iterable[dict[str, Any]]:
        response = self._response(usage)
        yield self._numbered({"type": f"response.{response['status']}", "response": response})

    def failed(self, failure: Failure) -> Iterable[dict[str, Any]]:
        """The response as far as it came; then an error, with its parts where OpenAI documents them and, once more,
        where the official client looks for what it raises.
        """
        error = failure.body["error"]
        code = "rate_limit_exceeded" if failure.status == 429 else "server_error"
        said = {"error": {"code": code, "message": error["message"]}, "output": self._output.items}
        yield self._numbered({"type": "response.failed", "response": {**self._head, "status": "failed", **said}})
        told = {name: error[name] for name in ("code", "message", "param")}
        yield self._numbered({"type": "error", **told, "error": error})

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: dict[str, Any]) -> dict[str, Any]:
        for piece in pieces[0]:
            self._output.push(piece)
        return self._response(usage)

    def _response(self, usage: dict[str, Any]) -> dict[str, Any]:
        is_cut_off = self._generation.finish_reasons[0] == "length"
        response = {
            **self._head,
            "status": "incomplete" if is_cut_off else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut_off else None,
            "completed_at": None if is_cut_off else int(time.time()),
            "output": self._output.items,
            "usage": _usage(usage),
        }
        self._keep(response)
        return response

    def _numbered(self, event: dict[str, Any]) -> dict[str, Any]:
        event["sequence_number"] = self._num_events
        self._num_events += 1
        return event


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": replies.reasoning_tokens(usage)},
        "total_tokens": usage["total_tokens"],
    }


def _head(body: ResponsesBody, generation: Generation, answer_id: str, model: str) -> dict[str, Any]:
    """What is known before the first token: what was asked for, defaults filled in."""
    params = generation.requests[0].params
    reasoning = body.reasoning
    return {
        "id": answer_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "model": model,
        "error": None,
        "incomplete_details": None,
        "output": [],
        "usage": None,
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {
            "effort": reasoning.effort if reasoning else None,
            "summary": (reasoning.summary or reasoning.generate_summary) if reasoning else None,
        },
        "service_tier": "default",
        "store": body.is_stored,
        "temperature": params.temperature,
        "text": {
            "format": (body.text and body.text.format) or {"type": "text"},
            "verbosity": (body.text and body.text.verbosity) or "medium",
        },
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": body.truncation or "disabled",
        "user": body.user,
    }
