"""From a form (StructuredOutputs) to a grammar that llguidance follows.

Knows llguidance's grammars and limits. Does not know sequences. What a client sends is hostile until shown otherwise:
texts are bounded, compiling runs on threads with room for deep recursion (grammars.py), and llguidance's own limits
bound what a grammar may cost, at once and with every token.
"""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from octavo.engine.errors import RequestError
from octavo.engine.grammar.spec import StructuredOutputs
from octavo.engine.grammar.structural_tag import TagError, lark_of_tags
from octavo.engine.grammar.where import pointer_of_fault

# White space between tokens of JSON that comes to an end: models are known to go on with it until max_tokens.
WHITESPACE = r"([ \t]|\r?\n[ \t]{0,64})?"
MAX_GBNF_CHARS = 1 << 16  # its conversion is slow
MAX_ERROR_CHARS = 400
# A fifth of llguidance's default for the first: expressions that explode do so within a tenth of a second.
LIMITS = LLParserLimits(initial_lexer_fuel=200_000, verbose_errors=False)
_DATA = ("const", "enum", "default", "examples", "example")  # keywords whose values are data, not schemas
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # from names to schemas
# What few programs read of a format: leap seconds, which are valid at a few moments of history; digits without end.
_TIME = r"^[^:]*:[^:]*:[0-5][0-9](\.[0-9]{1,9})?[zZ+-]"
_NARROWER = {"date-time": _TIME, "time": _TIME, "duration": "^P([0-9]{1,8}[YMWDHS]|T)+$"}
_UNKNOWN_FORMAT = re.compile(r"Unknown format: (.+)")


def compile_form(spec: StructuredOutputs, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the beginning of an output, its first mask made. Raises RequestError, naming the field of
    structured_outputs and, as far as that can be found, the place in it."""
    if spec.kind in ("json", "json_object"):
        return _compile_json(spec, tokenizer)
    try:
        return _matcher(_grammar(spec, tokenizer), tokenizer)
    except _Fault as fault:
        raise _refusal(spec, fault.reason) from None


def _grammar(spec: StructuredOutputs, tokenizer: LLTokenizer) -> str:
    if spec.regex is not None:
        return LLMatcher.grammar_from_regex(spec.regex)
    if spec.choice:
        texts = [json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(spec.choice)]
        return LLMatcher.grammar_from_lark(f"start: {' | '.join(texts)}")
    if spec.structural_tag is not None:
        try:
            return LLMatcher.grammar_from_lark(lark_of_tags(spec.structural_tag, tokenizer))
        except TagError as error:
            raise _refusal(spec, str(error)) from None
    assert spec.grammar is not None
    return LLMatcher.grammar_from_lark(_lark(spec))


def _lark(spec: StructuredOutputs) -> str:
    """Lark as it is; GBNF (llama.cpp) and EBNF are known by their `::=`."""
    text = spec.grammar or ""
    if "::=" not in text:
        return text
    if len(text) > MAX_GBNF_CHARS:
        raise _refusal(spec, f"a grammar in GBNF may have {MAX_GBNF_CHARS} characters")
    try:
        return any_to_lark(text)
    except RecursionError:
        raise _refusal(spec, "it is nested too deeply") from None
    except Exception as error:
        raise _refusal(spec, str(error)) from None


def _compile_json(spec: StructuredOutputs, tokenizer: LLTokenizer) -> LLMatcher:
    try:
        schema: Any = {"type": "object"} if spec.json is None else json.loads(spec.json)
    except (ValueError, RecursionError) as error:
        raise _refusal(spec, f"it is no JSON: {error}") from None
    if schema is True:
        schema = {}
    if schema is False:
        raise _refusal(spec, "there is no output that it allows")
    if not isinstance(schema, dict):
        raise _refusal(spec, "a JSON Schema is an object, true or false")
    options = _json_options(spec)
    _narrow_formats(schema)
    if spec.disable_additional_properties:
        _close(schema)
    for _ in range(32):
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema, ensure_ascii=False), defaults=options)
        try:
            matcher = _matcher(grammar, tokenizer)
            return _matcher(_after_thought(schema, options), tokenizer) if spec.begins_after else matcher
        except _Fault as fault:
            # Formats that are not known say nothing (JSON Schema 2020-12, 7.2.1).
            if (unknown := _UNKNOWN_FORMAT.fullmatch(fault.reason)) is None or not _drop_format(schema, unknown[1]):
                where = pointer_of_fault(schema, fault.reason, lambda part: _reason(part, options))
                raise _refusal(spec, fault.reason, where) from None
    raise _refusal(spec, "it has too many formats that are not known")


def _after_thought(schema: dict[str, Any], options: Any) -> str:
    """The same behind a line or two, which models leave between a thought and what follows it."""
    body = json.dumps({"x-guidance": options, **schema}, ensure_ascii=False)
    return LLMatcher.grammar_from_lark(f"start: SPACE? form\nSPACE: /[ \\t\\r\\n]{{1,8}}/\nform: %json {body}")


def _json_options(spec: StructuredOutputs) -> Any:
    if spec.whitespace_pattern is not None:
        return {"whitespace_pattern": spec.whitespace_pattern}
    return {"whitespace_flexible": False} if spec.disable_any_whitespace else {"whitespace_pattern": WHITESPACE}


def _reason(schema: Any, options: Any) -> str:
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema, ensure_ascii=False), defaults=options)
    return LLMatcher.validate_grammar(grammar, limits=LIMITS).strip()


class _Fault(Exception):
    """A grammar that llguidance refuses. reason: in its words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason.strip()


def _matcher(grammar: str, tokenizer: LLTokenizer) -> LLMatcher:
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise _Fault(matcher.get_error())
    first = matcher.deep_copy()
    mask = b"" if first.is_stopped() else first.compute_bitmask()
    if first.is_error():
        reason = first.get_error()
        raise _Fault("there is no output that it allows" if "NoExtension" in reason[:20] else reason)
    if mask and not any(mask):
        raise _Fault("there is no output that it allows")
    return matcher


def _refusal(spec: StructuredOutputs, reason: str, where: str | None = None) -> RequestError:
    name = f"structured_outputs.{spec.kind}"
    reason = reason.strip().removesuffix("<non-verbose/>").strip()
    if len(reason) > MAX_ERROR_CHARS:
        reason = f"{reason[:MAX_ERROR_CHARS]} …"
    place = f" at {where}" if where else ""
    return RequestError(f"{name} cannot be used{place}: {reason.rstrip('.')}.", name)


def _close(schema: Any) -> None:
    """Objects whose properties are named have no others, unless the schema speaks of them. In place."""
    for part in _parts(schema):
        if isinstance(part.get("properties"), dict) and not part.keys() & {"additionalProperties", "patternProperties"}:
            part["additionalProperties"] = False


def _narrow_formats(schema: Any) -> None:
    """In place."""
    for part in _parts(schema):
        pattern = _NARROWER.get(str(part.get("format")))
        if pattern is not None and isinstance(part.setdefault("allOf", []), list):
            part["allOf"].append({"pattern": pattern})


def _drop_format(schema: Any, name: str) -> bool:
    """Whether there was any."""
    found = [part for part in _parts(schema) if part.get("format") == name]
    for part in found:
        del part["format"]
    return bool(found)


def _parts(schema: Any) -> list[dict[str, Any]]:
    """All schemas in a schema, and itself."""
    found, left = [], [schema]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left.extend(part)
        elif isinstance(part, dict):
            found.append(part)
            for key, value in part.items():
                if key in _MAPS and isinstance(value, dict):
                    left.extend(value.values())
                elif key not in _DATA:
                    left.append(value)
    return found
