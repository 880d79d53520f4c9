"""Reads one JSON value from a tape, character by character as it is certain, and mends what models get wrong there.

Control characters inside strings are escaped, and backslashes that escape nothing are doubled; all else that is no JSON
is Malformed. Nesting costs no stack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from octavo.cluster.ingress.reading.tape import CutOff, Malformed, Reads, Tape

Emit = Callable[[str], None]

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_NUMBER_LIKE = re.compile(r"[-+.0-9eE]*")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORD = re.compile(r"[a-z]*")
_WORDS = ("true", "false", "null")
_HEX = frozenset("0123456789abcdefABCDEF")


def copy_value(tape: Tape, emit: Emit) -> Reads[None]:
    """One value, given to `emit` as it is read. Raises Malformed; `emit` has got all before the wrong place then."""
    open_brackets: list[str] = []
    while True:
        yield from _copy_spaces(tape, emit)
        char = yield from tape.peek()
        if char in ("{", "["):
            emit(tape.take())
            yield from _copy_spaces(tape, emit)
            closing = "}" if char == "{" else "]"
            open_brackets.append(closing)
            if (yield from tape.peek()) != closing:
                if char == "{":
                    yield from _copy_key(tape, emit)
                continue
        elif char == '"':
            yield from copy_string(tape, emit)
        else:
            yield from _copy_word(tape, emit)
        # Behind a value, or before the closing bracket of an empty one.
        while open_brackets:
            yield from _copy_spaces(tape, emit)
            char = yield from tape.peek()
            if char == open_brackets[-1]:
                open_brackets.pop()
                emit(tape.take())
            elif char == ",":
                emit(tape.take())
                if open_brackets[-1] == "}":
                    yield from _copy_spaces(tape, emit)
                    yield from _copy_key(tape, emit)
                break
            else:
                raise Malformed if char else CutOff
        else:
            return


def copy_string(tape: Tape, emit: Emit) -> Reads[None]:
    """One string, its quotes included."""
    if (yield from tape.peek()) != '"':
        raise Malformed
    emit(tape.take())
    while True:
        char = yield from tape.peek()
        if not char:
            raise CutOff
        if plain := tape.run(_PLAIN):
            emit(plain)
        elif char == "\\":
            tape.take()
            emit((yield from _escape(tape)))
        else:
            tape.take()
            emit(char if char == '"' else json.dumps(char)[1:-1])
            if char == '"':
                return


def read_string(tape: Tape) -> Reads[str]:
    """One string's value."""
    found: list[str] = []
    yield from copy_string(tape, found.append)
    value: str = json.loads("".join(found))
    return value


def _escape(tape: Tape) -> Reads[str]:
    """What stands behind a backslash, together with it."""
    char = yield from tape.peek()
    if char and char in '"\\/bfnrt':
        return "\\" + tape.take()
    if char != "u":
        return "\\\\"
    digits = tape.take()
    while len(digits) < 5:
        char = yield from tape.peek()
        if char not in _HEX:
            tape.back(digits)
            return "\\\\"
        digits += tape.take()
    return "\\" + digits


def _copy_key(tape: Tape, emit: Emit) -> Reads[None]:
    yield from copy_string(tape, emit)
    yield from _copy_spaces(tape, emit)
    if (yield from tape.peek()) != ":":
        raise Malformed
    emit(tape.take())


def _copy_word(tape: Tape, emit: Emit) -> Reads[None]:
    """A number, true, false or null: given out when it is whole, or when the text ends in it."""
    number = yield from tape.all_of(_NUMBER_LIKE)
    word = number or (yield from tape.all_of(_WORD))
    if _NUMBER.fullmatch(word) if number else word in _WORDS:
        emit(word)
    elif word and not (yield from tape.peek()) and _is_begun(word, bool(number)):
        emit(word)
        raise CutOff
    else:
        tape.back(word)
        raise Malformed


def _is_begun(word: str, is_number: bool) -> bool:
    if is_number:
        return _NUMBER.fullmatch(word + "0") is not None
    return any(known.startswith(word) for known in _WORDS)


def _copy_spaces(tape: Tape, emit: Emit) -> Reads[None]:
    emit((yield from tape.all_of(_JSON_SPACES)))


_JSON_SPACES = re.compile(r"[ \t\n\r]*")
