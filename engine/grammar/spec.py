"""StructuredOutputs: the form a client asks its output to have, with vLLM's names.

Knows the fields and which go together. Does not know grammars: whether a schema, a regular expression or a grammar can
be used is found when it is compiled (compiler.py), from the same value.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from octavo.engine.errors import RequestError

# The longest text of a schema, grammar or expression, in characters, and the most choices.
MAX_CHARS = 1 << 20
MAX_CHOICES = 10_000
_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """Exactly one form: `json` (a JSON Schema, as JSON text; a mapping is turned into it), `regex`, `choice`, `grammar`
    (Lark or GBNF), `json_object` (any JSON object) or `structural_tag` (as JSON text; a mapping is turned into it).

    disable_any_whitespace: JSON without white space between its tokens. disable_additional_properties: objects have no
    properties but those their schema names, unless it speaks of others. whitespace_pattern: a regular expression for
    the white space between tokens of JSON; by default that is a little, never without end.
    begins_after: token ids; the form holds for what follows their first occurrence in the output (a model that thinks
    first), and all else is free; JSON may then come behind a line or two. Empty = from the beginning.

    Raises RequestError, naming the field, unless it is exactly one form of the right type.
    """

    json: str | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    begins_after: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        normalize = object.__setattr__  # once, before anybody has seen it
        for name in ("json", "structural_tag"):
            value: Any = getattr(self, name)
            if isinstance(value, (dict, bool)):
                normalize(self, name, _text(name, value))
        normalize(self, "choice", _tuple("choice", self.choice, str))
        normalize(self, "begins_after", _tuple("begins_after", self.begins_after, int))
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise _error(name, "must be true or false")
        for name in ("json", "regex", "grammar", "structural_tag", "whitespace_pattern"):
            self._check_text(name, getattr(self, name))
        if len(self.choice) > MAX_CHOICES or sum(map(len, self.choice)) > MAX_CHARS:
            raise _error("choice", f"must have at most {MAX_CHOICES} choices of {MAX_CHARS} characters together")
        if len(self._given) != 1:
            given = f"{' and '.join(self._given)} are given" if self._given else "none is given"
            raise RequestError(
                f"structured_outputs must have exactly one of {', '.join(_KINDS)}, but {given}.", "structured_outputs"
            )

    @property
    def kind(self) -> str:
        """The name of the field that says the form."""
        return self._given[0]

    @property
    def num_chars(self) -> int:
        return sum(len(text or "") for text in (self.json, self.regex, self.grammar, self.structural_tag, *self.choice))

    @property
    def _given(self) -> list[str]:
        return [name for name in _KINDS if getattr(self, name) not in (None, False, ())]

    def _check_text(self, name: str, value: Any) -> None:
        if value is None:
            return
        if not isinstance(value, str):
            raise _error(name, "must be a string")
        if len(value) > MAX_CHARS:
            raise _error(name, f"must have at most {MAX_CHARS} characters, got {len(value)}")
        if not _is_text(value):
            raise _error(name, "has half of a surrogate pair, which is no character")

    def replace(self, **changes: Any) -> StructuredOutputs:
        """A copy with `changes`, validated anew."""
        return dataclasses.replace(self, **changes)


def _text(name: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _error(name, f"is no JSON: {error}") from None


def _tuple(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(type(item) is kind for item in value):
        raise _error(name, f"must be a list of {'strings' if kind is str else 'token ids'}")
    if name == "choice" and not value and isinstance(value, list):
        raise _error(name, "must have at least one choice")
    if kind is str and not _is_text("".join(value)):
        raise _error(name, "has half of a surrogate pair, which is no character")
    return tuple(value)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _error(name: str, what: str) -> RequestError:
    return RequestError(f"structured_outputs.{name} {what}.", f"structured_outputs.{name}")
