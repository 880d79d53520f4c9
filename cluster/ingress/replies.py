"""The bodies of answers, in OpenAI's shapes, and their JSON.

Plain functions from values to dicts. That they match the `openai` package's types is tested; the server does not import
it, for that takes 0.4 s at start-up, and building its objects costs many times what the rest of a chunk does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode

# JSON has no infinities; vLLM uses the same floor.
LOWEST_LOGPROB = -9999.0

# Characters above ASCII at which `str.splitlines`, and with it many a client's reading of lines, ends a line.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def to_json(body: Mapping[str, Any]) -> bytes:
    """Never more than one line, whatever a client takes for the end of one."""
    text = _encode(body)
    if not text.isascii():
        text = text.translate(_LINE_ENDS)
    # surrogatepass never happens for text of ours; "replace" keeps a client's odd header or name from becoming a 500
    return text.encode("utf-8", "replace")


def event(body: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(body) + b"\n\n"


def named_event(body: Mapping[str, Any]) -> bytes:
    """The same, with the body's type as the event's name."""
    return f"event: {body['type']}\n".encode() + event(body)


@dataclass(frozen=True, slots=True)
class EventForm:
    """How a vendor's streams are written: each event, and what comes after the last one."""

    event: Callable[[Mapping[str, Any]], bytes]
    end: bytes


DATA_EVENTS = EventForm(event, b"data: [DONE]\n\n")  # OpenAI's completions
NAMED_EVENTS = EventForm(named_event, b"")  # OpenAI's responses, Anthropic's messages


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) and logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def reasoning_tokens(usage: Mapping[str, Any]) -> int:
    """Of a usage: 0 where thoughts are not counted."""
    count: int = usage.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
    return count


def error(message: str, kind: str, param: str | None, code: str | int | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
