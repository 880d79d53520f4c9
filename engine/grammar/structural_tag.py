"""Structural tags: text with parts of a given form between a beginning and an end, as one Lark grammar.

Both notations: vLLM's first one, `structures` and `triggers`, and `format`, a tree of elements as XGrammar has them
(const_string, json_schema, regex, any_text, sequence, or, tag, triggered_tags, tags_with_separator, optional, star,
plus). Special tokens, which are no text to a grammar, are found in literals by the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llguidance import LLTokenizer

MAX_DEPTH = 32


class TagError(Exception):
    """What is wrong, and where."""


def lark_of_tags(text: str, tokenizer: LLTokenizer) -> str:
    """The grammar for the JSON text of a structural tag. Raises TagError."""
    try:
        tag = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TagError(f"it is no JSON: {error}") from None
    if not isinstance(tag, dict) or tag.get("type", "structural_tag") != "structural_tag":
        raise TagError("it must be an object with the type structural_tag")
    writer = _Writer(tokenizer)
    if "format" in tag:
        whole = writer.element(tag["format"], "format", 0)
    else:
        whole = writer.structures(tag)
    return "\n".join(["%llguidance {}", f"start: {whole or writer.literal('')}", *writer.rules, "TEXT: /(.|\\n)*/"])


class _Writer:
    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self.rules: list[str] = []

    def literal(self, text: str) -> str:
        """The text, its special tokens by their ids."""
        parts: list[str] = []
        plain: list[int] = []
        for token in [*self._tokenizer.tokenize_str(text, parse_special=True), None]:
            special = token is not None and self._tokenizer.is_special_token(token)
            if token is not None and not special:
                plain.append(token)
                continue
            if plain:
                parts.append(_quoted(self._tokenizer.decode_str(plain)))
                plain = []
            if special:
                parts.append(f"<[{token}]>")
        return " ".join(parts)

    def structures(self, tag: dict[str, Any]) -> str:
        tags = [
            {"begin": _field(item, "begin", str, place), "end": _field(item, "end", str, place), "content": content}
            for place, item in ((f"structures/{i}", item) for i, item in enumerate(_field(tag, "structures", list, "")))
            for content in [{"type": "json_schema", "json_schema": item.get("schema", {})}]
        ]
        return self._triggered({"tags": tags, "triggers": tag.get("triggers")}, "", 0)

    def element(self, item: Any, place: str, depth: int) -> str:
        if not isinstance(item, dict):
            raise TagError(f"it must be an object (at /{place})")
        if depth > MAX_DEPTH:
            raise TagError(f"it is nested too deeply (at /{place})")
        kind = item.get("type")
        match kind:
            case "const_string":
                return self.literal(_field(item, "value", str, place))
            case "json_schema":
                return f"%json {_schema(item.get('json_schema'), place)}"
            case "regex":
                pattern = _field(item, "pattern", str, place)
                return self._rule(f"/{pattern.replace('/', chr(92) + '/')}/")
            case "any_text":
                return "TEXT"
            case "sequence" | "or":
                parts = [
                    self.element(part, f"{place}/elements/{i}", depth + 1)
                    for i, part in enumerate(_field(item, "elements", list, place))
                ]
                return f"({(' | ' if kind == 'or' else ' ').join(part or _quoted('') for part in parts)})"
            case "optional" | "star" | "plus":
                content = self.element(item.get("content"), f"{place}/content", depth + 1)
                return f"({content}){ {'optional': '?', 'star': '*', 'plus': '+'}[kind] }"
            case "tag":
                return self._tag(item, "", place, depth)
            case "triggered_tags":
                return self._triggered(item, place, depth)
            case "tags_with_separator":
                return self._separated(item, place, depth)
        raise TagError(f"there is no element of type {kind!r} (at /{place})")

    def _tag(self, tag: Any, trigger: str, place: str, depth: int) -> str:
        """begin, content, end; behind `trigger`, which begins it."""
        begin = _field(tag, "begin", str, place).removeprefix(trigger)
        ends = tag.get("end", "") if isinstance(tag.get("end"), list) else [_field(tag, "end", str, place)]
        if not all(isinstance(end, str) for end in ends):
            raise TagError(f"end must be a string (at /{place})")
        content = tag.get("content")
        if isinstance(content, dict) and content.get("type") == "any_text":
            inner = f"({' | '.join(self._text_until(end) for end in ends)})"
        else:
            inner = self.element(content, f"{place}/content", depth + 1)
            inner += f" ({' | '.join(self.literal(end) or _quoted('') for end in ends)})"
        return self._rule(f"{self.literal(begin)} {inner}")

    def _text_until(self, end: str) -> str:
        literal = self.literal(end)
        if not literal:
            return "TEXT"
        return f"TEXT {literal}" if literal.startswith("<[") else self._rule(f"TEXT {literal}", "[lazy]")

    def _triggered(self, item: dict[str, Any], place: str, depth: int) -> str:
        triggers = _field(item, "triggers", list, place)
        opened = []
        for i, tag in enumerate(self._tags(item, place)):
            begin = _field(tag, "begin", str, f"{place}/tags/{i}")
            trigger = next((t for t in triggers if isinstance(t, str) and t and begin.startswith(t)), None)
            if trigger is None:
                raise TagError(f"no trigger begins {begin!r} (at /{place}/tags/{i})")
            rest = self._tag(tag, trigger, f"{place}/tags/{i}", depth)
            opened.append(f"{self._text_until(trigger)} {rest}")
        tags = f"({' | '.join(opened)})"
        many = tags if item.get("stop_after_first") else f"{tags}{'+' if item.get('at_least_one') else '*'}"
        if item.get("stop_after_first"):
            return many if item.get("at_least_one") else f"({many} | TEXT)"
        return f"{many} TEXT"

    def _separated(self, item: dict[str, Any], place: str, depth: int) -> str:
        tags = [self._tag(tag, "", f"{place}/tags/{i}", depth) for i, tag in enumerate(self._tags(item, place))]
        one = f"({' | '.join(tags)})"
        separator = self.literal(_field(item, "separator", str, place))
        many = one if item.get("stop_after_first") else f"{one} ({separator} {one})*"
        return f"({many})" if item.get("at_least_one") else f"({many})?"

    def _tags(self, item: dict[str, Any], place: str) -> Sequence[Any]:
        tags: list[Any] = _field(item, "tags", list, place)
        if not tags:
            raise TagError(f"there are no tags (at /{place})")
        return tags

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"part_{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {body}")
        return name


def _field(item: Any, name: str, kind: type, place: str) -> Any:
    value = item.get(name) if isinstance(item, dict) else None
    if not isinstance(value, kind):
        raise TagError(f"{name} must be {'a string' if kind is str else 'a list'} (at /{place})")
    return value


def _schema(schema: Any, place: str) -> str:
    if not isinstance(schema, (dict, bool)):
        raise TagError(f"json_schema must be a JSON Schema (at /{place})")
    return json.dumps(schema if isinstance(schema, dict) else {} if schema else {"not": {}}, ensure_ascii=False)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
