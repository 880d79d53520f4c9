"""From a request body to the form its output is to have: OpenAI's response_format, vLLM's structured_outputs and the
guided_* fields that these replaced.

Knows names and types. Whether a schema or grammar can be used, the compiler says (octavo.engine.grammar).
"""

from __future__ import annotations

import logging
from typing import Any

from octavo.cluster.ingress.protocol import GenerationBody
from octavo.engine.errors import RequestError
from octavo.engine.grammar.spec import StructuredOutputs

logger = logging.getLogger(__name__)

_FORMATS = "text, json_object, json_schema or structural_tag"
# Old name → its name in structured_outputs.
_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
}
_ASIDE = {"guided_whitespace_pattern": "whitespace_pattern"}
FORM_FIELDS = frozenset(StructuredOutputs.__dataclass_fields__) - {"begins_after"}


def structured_of(body: GenerationBody) -> StructuredOutputs | None:
    """The form that the body asks for, None = none. Raises RequestError, naming the field."""
    found = {name: value for name, value in _forms(body).items() if value is not None}
    if len(found) > 1:
        first, second = list(found)[:2]
        raise RequestError(f"{first} and {second} cannot be given together: one form is all an output has.", second)
    for name, values in found.items():
        try:
            return StructuredOutputs(**values)
        except RequestError as error:
            raise _renamed(error, name) from None
    return None


def name_of_form(body: GenerationBody, form: StructuredOutputs) -> str:
    """The name of the body's field that says the form, for what is found to be wrong with it later."""
    if _response_format(body.response_format) is not None:
        return "response_format.json_schema.schema" if form.kind == "json" else "response_format"
    if body.structured_outputs:
        return f"structured_outputs.{form.kind}"
    if body.structural_tag:
        return "structural_tag"
    return next((old for old, new in _GUIDED.items() if new == form.kind), form.kind)


def _forms(body: GenerationBody) -> dict[str, dict[str, Any] | None]:
    return {
        "response_format": _response_format(body.response_format),
        "structured_outputs": _structured_outputs(body.structured_outputs),
        "structural_tag": {"structural_tag": body.structural_tag} if body.structural_tag else None,
        "guided": _guided(body),
    }


def _response_format(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if not value:
        return None
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            return {"json_object": True}
        case "json_schema":
            given = value.get("json_schema")
            if not isinstance(given, dict):
                raise RequestError(
                    "response_format.json_schema is required: an object with a schema.", "response_format.json_schema"
                )
            schema = given.get("schema")
            if not isinstance(schema, (dict, bool)):
                name = "response_format.json_schema.schema"
                raise RequestError(f"{name} must be a JSON Schema: an object, true or false.", name)
            return {"json": schema}
        case "structural_tag":
            return {"structural_tag": value}
        case kind:
            raise RequestError(f"response_format.type must be {_FORMATS}, got {kind!r}.", "response_format.type")


def _structured_outputs(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if not value:
        return None
    for name in value:
        if name not in FORM_FIELDS and not name.startswith("_"):
            raise RequestError(f"structured_outputs has no field {name!r}.", f"structured_outputs.{name}")
    return {name: item for name, item in value.items() if item is not None and not name.startswith("_")} or None


def _guided(body: GenerationBody) -> dict[str, Any] | None:
    given = {old: getattr(body, old) for old in (*_GUIDED, *_ASIDE)}
    given = {old: value for old, value in given.items() if value not in (None, False, "")}
    forms = [old for old in given if old in _GUIDED]
    if not forms:
        return None
    if len(forms) > 1:
        raise RequestError(f"{forms[0]} and {forms[1]} cannot be given together.", forms[1])
    _warn_of_guided()
    return {{**_GUIDED, **_ASIDE}[old]: value for old, value in given.items()}


_warned: list[bool] = []


def _warn_of_guided() -> None:
    """Once in the life of the process."""
    if not _warned:
        _warned.append(True)
        logger.warning("guided_json and the like are old names: structured_outputs has taken their place")


def _renamed(error: RequestError, field: str) -> RequestError:
    """The error with the names of the field that the client sent."""
    if field == "structured_outputs":
        return error
    inner = (error.param or "").removeprefix("structured_outputs").lstrip(".")
    if field == "guided":
        old = next((name for name, new in {**_GUIDED, **_ASIDE}.items() if new == inner), "guided_json")
        return RequestError(error.message.replace(f"structured_outputs.{inner}", old), old)
    return RequestError(error.message.replace(f"structured_outputs.{inner}", field), field)
