"""The OpenAPI document: what the paths take and answer.

The paths read their bodies and write their answers themselves, so FastAPI does not know them: they are put in here. An
answer is described as far as every answer of the path has it; all its fields are OpenAI's, or another vendor's, to
define.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/"
DESCRIPTION = """Serves language models over the APIs that applications know: OpenAI's, Anthropic's, vLLM's additions.

Fields that no version of these APIs has are accepted, and have no effect. A field with a wrong value is a 400, whose
`error.param` names it."""

_TEXT: dict[str, Any] = {"type": "string"}
_NUMBER: dict[str, Any] = {"type": "integer", "minimum": 0}
_OBJECT: dict[str, Any] = {"type": "object"}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _list_of(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


SCHEMAS: Mapping[str, dict[str, Any]] = {
    "Error": _object(
        error={
            **_object(message=_TEXT, type=_TEXT),
            "properties": {
                "message": {**_TEXT, "description": "One sentence that says what is wrong."},
                "type": _TEXT,
                "param": {"type": ["string", "null"], "description": "The field that is wrong."},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    ),
    "AnthropicError": _object(type={"const": "error"}, error=_object(message=_TEXT, type=_TEXT)),
    "Usage": _object(prompt_tokens=_NUMBER, completion_tokens=_NUMBER, total_tokens=_NUMBER),
    "Completion": _object(
        id=_TEXT,
        object={"const": "text_completion"},
        created=_NUMBER,
        model=_TEXT,
        choices=_list_of(_object(index=_NUMBER, text=_TEXT, finish_reason={"type": ["string", "null"]})),
        usage={"$ref": f"{_REF}Usage"},
    ),
    "ChatCompletion": _object(
        id=_TEXT,
        object={"const": "chat.completion"},
        created=_NUMBER,
        model=_TEXT,
        choices=_list_of(_object(index=_NUMBER, message=_OBJECT, finish_reason={"type": ["string", "null"]})),
        usage={"$ref": f"{_REF}Usage"},
    ),
    "Model": _object(id=_TEXT, object={"const": "model"}, created=_NUMBER, owned_by=_TEXT),
    "Models": _object(object={"const": "list"}, data=_list_of({"$ref": f"{_REF}Model"})),
    "Tokens": _object(count=_NUMBER, max_model_len=_NUMBER, tokens=_list_of(_NUMBER)),
    "Prompt": _object(prompt=_TEXT),
    "Version": _object(version=_TEXT),
}
# Path → what it answers, where that is not just an object.
_ANSWERS: Mapping[str, str] = {
    "/v1/completions": "Completion",
    "/v1/chat/completions": "ChatCompletion",
    "/tokenize": "Tokens",
    "/detokenize": "Prompt",
    "/v1/models": "Models",
    "/v1/models/{name}": "Model",
    "/version": "Version",
}
_STREAMS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
_EMPTY = ("/health", "/ready", "/ping")
_ASKS_NOTHING = (*_EMPTY, "/version", "/metrics")
_FAILURES: Mapping[str, str] = {
    "400": "The request can never succeed as it is; `error.param` names the field.",
    "401": "No valid API key.",
    "404": "There is no such model, or nothing at this path.",
    "408": "The request, or its body, took longer than the server allows.",
    "413": "The body is longer than the server allows.",
    "429": "Too much work at present; `Retry-After` says when to come back.",
    "500": "A bug; the server's log has the details.",
    "503": "No engine is there at present; `Retry-After` says when to come back.",
}


def describe(app: FastAPI, bodies: Mapping[str, type[BaseModel]], needs_key: bool, open_paths: frozenset[str]) -> None:
    """Make `app.openapi` say what the paths take (`bodies`) and answer. open_paths: that need no key."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            document["info"]["description"] = DESCRIPTION
            _, definitions = models_json_schema(
                [(kind, "validation") for kind in bodies.values()], ref_template=_REF + "{model}"
            )
            document["components"] = {"schemas": {**definitions["$defs"], **SCHEMAS}}
            if needs_key:
                document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, methods in document["paths"].items():
                for method, operation in methods.items():
                    operation["responses"] = _responses(path)
                    if path in bodies and method == "post":
                        content = _json({"$ref": _REF + bodies[path].__name__})
                        operation["requestBody"] = {"required": True, "content": content}
                    if needs_key and path not in open_paths:
                        operation["security"] = [{"key": []}]
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document


def _responses(path: str) -> dict[str, Any]:
    error = _json({"$ref": _REF + ("AnthropicError" if path.startswith("/v1/messages") else "Error")})
    answers: dict[str, Any] = {"200": {"description": "The answer.", "content": _answer(path)}}
    if path in _EMPTY:
        answers = {"200": {"description": "All is well."}}
    failures = ("500", "503") if path in _ASKS_NOTHING else tuple(_FAILURES)
    return answers | {status: {"description": _FAILURES[status], "content": error} for status in failures}


def _answer(path: str) -> dict[str, Any]:
    if path == "/metrics":
        return {"text/plain": {"schema": _TEXT}}
    content = _json({"$ref": _REF + _ANSWERS[path]} if path in _ANSWERS else _OBJECT)
    if path in _STREAMS:
        content["text/event-stream"] = {"schema": {**_TEXT, "description": "With `stream`: server-sent events."}}
    return content


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
