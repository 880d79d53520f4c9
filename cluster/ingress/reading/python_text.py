"""Reads one Python literal from a tape and gives it out as JSON: strings character by character, all else by the word.

Strings (no prefixes but r and u), numbers, True, False, None and their JSON names, lists, tuples (as lists) and
dictionaries with strings as keys. Nesting costs no stack.
"""

from __future__ import annotations

import json
import re

from octavo.cluster.ingress.reading.json_text import Emit
from octavo.cluster.ingress.reading.tape import CutOff, Malformed, Reads, Tape

_WORD = re.compile(r"[-+.\w]*")
_INTEGER = re.compile(r"-?[0-9][0-9_]*")
_PLAIN = {"'": re.compile(r"[^'\\\x00-\x1f]*"), '"': re.compile(r'[^"\\\x00-\x1f]*')}
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES = {**{char: char for char in "'\"\\"}, "n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}
_ESCAPES |= {"a": "\a", "v": "\v", "0": "\0"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_HEX = frozenset("0123456789abcdefABCDEF")
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_HIGHEST_CHARACTER = 0x10FFFF


def copy_as_json(tape: Tape, emit: Emit) -> Reads[None]:
    """One value. Raises Malformed; `emit` has got all before the wrong place then."""
    open_brackets: list[str] = []
    while True:
        yield from tape.spaces()
        char = yield from tape.peek()
        if char and char in _CLOSING:
            tape.take()
            open_brackets.append(_CLOSING[char])
            emit("{" if char == "{" else "[")
            yield from tape.spaces()
            if (yield from tape.peek()) != open_brackets[-1]:
                yield from _key_if_any(tape, emit, open_brackets)
                continue
        else:
            yield from _copy_scalar(tape, emit)
        while open_brackets:
            yield from tape.spaces()
            comma = yield from tape.literal(",")
            yield from tape.spaces()
            char = yield from tape.peek()
            if char == open_brackets[-1]:
                tape.take()
                emit("}" if open_brackets.pop() == "}" else "]")
            elif comma:
                emit(", ")
                yield from _key_if_any(tape, emit, open_brackets)
                break
            else:
                raise Malformed if char else CutOff
        else:
            return


def _key_if_any(tape: Tape, emit: Emit, open_brackets: list[str]) -> Reads[None]:
    if open_brackets[-1] == "}":
        yield from tape.spaces()
        yield from _copy_string(tape, emit)
        yield from tape.spaces()
        yield from tape.expect(":")
        emit(": ")


def _copy_scalar(tape: Tape, emit: Emit) -> Reads[None]:
    char = yield from tape.peek()
    if not char:
        raise CutOff
    if char in "'\"":
        yield from _copy_string(tape, emit)
        return
    word = yield from tape.all_of(_WORD)
    after = yield from tape.peek()
    if word in ("r", "R", "u", "U") and after and after in "'\"":
        yield from _copy_string(tape, emit, is_raw=word in "rR")
    elif (value := _json_of(word)) is not None:
        emit(value)
    else:
        tape.back(word)
        raise Malformed if after else CutOff


def _json_of(word: str) -> str | None:
    if word in _WORDS:
        return _WORDS[word]
    try:
        return json.dumps(int(word) if _INTEGER.fullmatch(word) else float(word), allow_nan=False)
    except ValueError:
        return None


def _copy_string(tape: Tape, emit: Emit, is_raw: bool = False) -> Reads[None]:
    quote = yield from tape.peek()
    if not quote or quote not in _PLAIN:
        raise Malformed if quote else CutOff
    tape.take()
    end = quote
    if (yield from tape.literal(quote)):
        if not (yield from tape.literal(quote)):
            emit('""')
            return
        end = quote * 3
    emit('"')
    while not (yield from tape.literal(end)):
        char = yield from tape.peek()
        if not char:
            raise CutOff
        if plain := tape.run(_PLAIN[quote]):
            emit(_escaped(plain))
        elif tape.take() == "\\" and not is_raw:
            emit(_escaped((yield from _escape(tape))))
        else:
            emit(_escaped(char))
    emit('"')


def _escape(tape: Tape) -> Reads[str]:
    """What a backslash and what stands behind it mean."""
    char = yield from tape.peek()
    if not char:
        raise CutOff
    tape.take()
    if char in _ESCAPES:
        return _ESCAPES[char]
    digits = ""
    while len(digits) < _HEX_DIGITS.get(char, 0):
        digit = yield from tape.peek()
        if digit not in _HEX:
            break
        digits += tape.take()
    if digits and len(digits) == _HEX_DIGITS[char] and int(digits, 16) <= _HIGHEST_CHARACTER:
        return chr(int(digits, 16))
    return "\\" + char + digits


def _escaped(text: str) -> str:
    """As it stands inside a JSON string; halves of surrogate pairs stay escapes, which is all that they can be."""
    is_text = not any("\ud800" <= char <= "\udfff" for char in text)
    return json.dumps(text, ensure_ascii=not is_text)[1:-1]
