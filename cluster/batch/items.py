"""The lines of a batch: OpenAI's batch file format, in and out.

Knows the format. Does not know who answers, nor where lines are kept.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 64 << 20
MAX_ID_CHARS = 1024


@dataclass(frozen=True, slots=True)
class Item:
    """One request. `line`: its number in the input, from 1."""

    line: int
    custom_id: str
    url: str
    body: Mapping[str, Any]

    @property
    def key(self) -> bytes:
        return key_of(self.custom_id)


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request."""

    line: int
    code: str
    message: str
    custom_id: str | None = None

    @property
    def key(self) -> bytes:
        return key_of(self.line)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server has said to a request. `body`: JSON; its text where it is none."""

    status: int
    request_id: str
    body: Any

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


def key_of(name: str | int) -> bytes:
    """What a request (by its custom_id) or a bad line (by its number) is remembered as."""
    return blake2b(json.dumps(name).encode(), digest_size=16).digest()


def read_items(source: Path) -> Iterator[Item | BadLine]:
    """The lines of a file, one at a time, blank ones left out. A custom_id that comes again is a bad line."""
    seen: set[bytes] = set()
    with source.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_LINE_BYTES)
                yield BadLine(number, "line_too_long", f"The line is longer than {MAX_LINE_BYTES >> 20} MiB.")
                continue
            if not raw.strip():
                continue
            item = parse_line(number, raw)
            if isinstance(item, Item):
                if item.key in seen:
                    twice = f"custom_id {item.custom_id!r} was used by an earlier line."
                    item = BadLine(number, "duplicate_custom_id", twice, item.custom_id)
                else:
                    seen.add(item.key)
            yield item


def count_lines(source: Path) -> int:
    """Lines that are not blank."""
    with source.open("rb") as file:
        return sum(1 for line in file if line.strip())


def parse_line(number: int, raw: bytes) -> Item | BadLine:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return BadLine(number, "invalid_json_line", f"The line is not JSON: {error}.")
    if not isinstance(fields, dict):
        return BadLine(number, "invalid_json_line", "The line is not a JSON object.")
    custom_id, url, body = fields.get("custom_id"), fields.get("url"), fields.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS:
        return BadLine(number, "invalid_custom_id", f"custom_id must be a string of 1 to {MAX_ID_CHARS} characters.")
    if fields.get("method", "POST") != "POST":
        return BadLine(number, "invalid_method", "method must be POST.", custom_id)
    if not isinstance(url, str) or not url.startswith("/") or url.startswith("//"):
        return BadLine(number, "invalid_url", "url must be a path, such as /v1/chat/completions.", custom_id)
    if not isinstance(body, dict):
        return BadLine(number, "invalid_body", "body must be a JSON object.", custom_id)
    if body.get("stream"):
        return BadLine(number, "invalid_body", "body.stream must not be true: answers go to a file.", custom_id)
    return Item(number, custom_id, url, body)


def answer(item: Item, reply: Reply) -> dict[str, Any]:
    response = {"status_code": reply.status, "request_id": reply.request_id, "body": reply.body}
    return {"id": _id(), "custom_id": item.custom_id, "response": response, "error": None}


def complaint(bad: BadLine) -> dict[str, Any]:
    error = {"code": bad.code, "message": bad.message, "line": bad.line}
    return {"id": _id(), "custom_id": bad.custom_id, "response": None, "error": error}


def key_of_record(record: Any) -> bytes | None:
    """The key of the line that `record`, a line of output, belongs to; None if it is no line of output."""
    if not isinstance(record, dict) or not {"custom_id", "response", "error"} <= record.keys():
        return None
    error = record["error"]
    if isinstance(error, dict) and isinstance(error.get("line"), int):
        return key_of(error["line"])
    return key_of(record["custom_id"]) if isinstance(record["custom_id"], str) else None


def _id() -> str:
    return f"batch_req_{secrets.token_hex(12)}"
