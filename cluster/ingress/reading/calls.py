"""CallReader: text in which a model calls tools, in some notation. What all notations have in common.

Text is given out until a call may begin. What then turns out to be none is text as well. Once a call is certain (its
name, and that arguments follow), its arguments are given out as they are read; should they break off in nonsense, what
comes then is text again and the arguments stay unfinished: they are no JSON, so nobody can take them for whole.

Spaces around calls belong to the notation; those inside the text that is left are kept.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

from octavo.cluster.ingress.reading.json_text import Emit, copy_value, read_string
from octavo.cluster.ingress.reading.parts import Answer, CallArguments, CallBegun, Part, Reader
from octavo.cluster.ingress.reading.tape import CutOff, Malformed, Reads, Tape

# The tools that a request offers: name → JSON Schema of the arguments.
Offer = Mapping[str, Mapping[str, Any]]

_KEYS = ("name", "arguments", "parameters", "type", "id")
_ALPHANUMERIC = string.ascii_letters + string.digits


def new_call_id() -> str:
    return "call_" + secrets.token_hex(12)


def short_call_id() -> str:
    """Nine letters and digits: Mistral's chat templates take no other."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


class CallReader(ABC):
    """A Reader (see parts.py). A notation says what may open a call, and reads what follows.

    MARKERS: pieces of text that open calls wherever they stand. BARE: characters that may do so at the beginning of a
    line.
    """

    MARKERS: ClassVar[tuple[str, ...]] = ()
    BARE: ClassVar[str] = ""

    def __init__(self, offer: Offer, new_id: Callable[[], str] = new_call_id) -> None:
        self.offer = offer
        self.tape = Tape()
        self.num_calls = 0
        self._new_id = new_id
        self._pending = ""  # spaces that may be text, or stand around a call
        self._is_certain = False  # of what was opened: that it is a call
        self._has_said = False
        self._at_beginning = True  # nothing but spaces so far, or since a call
        openers = "".join({marker[0] for marker in self.MARKERS} | set(self.BARE))
        self._prose = re.compile(f"[^{re.escape(openers)}]*") if openers else re.compile(r"(?s).*")
        self._work = self._read()

    def push(self, text: str, ended: bool) -> list[Part]:
        self.tape.add(text, ended)
        next(self._work, None)
        return self.tape.found()

    @abstractmethod
    def call(self, opener: str) -> Reads[None]:
        """Reads one call or several; `opener` is taken already. Raises Malformed."""

    # ---- for notations

    def begin(self, name: str) -> Emit:
        """A call is certain; what to give its arguments to, as they come."""
        index = self.num_calls
        self.num_calls += 1
        self.tape.unmark()
        self._pending = ""
        self._at_beginning = self._is_certain = True
        self.tape.parts.append(CallBegun(index, self._new_id(), name))
        return lambda text: self.tape.parts.append(CallArguments(index, text))

    def complete(self) -> None:
        """The arguments are all there. What follows of the notation is text, should it turn out to be none."""
        self.tape.mark()

    @property
    def is_complete(self) -> bool:
        """Whether the newest call has all its arguments, so that no more than the end of its notation is to come."""
        return self._is_certain and self.tape.is_marked

    def another(self, separator: str) -> Reads[bool]:
        """Whether `separator` follows, and thus another call."""
        yield from self.tape.spaces()
        if not (yield from self.tape.literal(separator)):
            return False
        self._is_certain = False
        return True

    def json_call(self, known_only: bool = False) -> Reads[None]:
        """`{"name": …, "arguments": {…}}`, or "parameters", with the keys in any order and further ones ignored.

        known_only: it is a call only if such a tool is offered, and no other keys come before its name.
        """
        tape = self.tape
        yield from tape.expect("{")
        name: str | None = None
        kept: list[str] | None = None  # arguments that came before the name
        begun = False
        while True:
            yield from tape.spaces()
            key = yield from read_string(tape)
            yield from tape.spaces()
            yield from tape.expect(":")
            yield from tape.spaces()
            if key == "name" and name is None:
                name = yield from read_string(tape)
                if not name or (known_only and name not in self.offer):
                    raise Malformed
            elif key in ("arguments", "parameters") and not begun and kept is None:
                if name is None:
                    kept = []
                    yield from self._arguments(partial(_keep, kept))
                else:
                    yield from self.json_arguments(name)
                    begun = True
            elif known_only and name is None and key not in _KEYS:
                raise Malformed  # JSON of the answer's own, which must not be held back
            else:
                yield from copy_value(tape, _ignore)
            yield from tape.spaces()
            if not (yield from tape.literal(",")):
                break
        yield from tape.expect("}")
        if name is None:
            raise Malformed
        if not begun:
            self.begin(name)("".join(kept or ["{}"]))
            self.complete()

    def json_calls(self, known_only: bool = False) -> Reads[None]:
        """`[call, call …]`: JSON calls in a list."""
        yield from self.tape.expect("[")
        while True:
            yield from self.tape.spaces()
            yield from self.json_call(known_only)
            if not (yield from self.another(",")):
                break
        yield from self.tape.expect("]")

    def json_arguments(self, name: str) -> Reads[None]:
        """The arguments of the tool `name`, an object, with nothing around."""
        yield from self._arguments(partial(self.begin, name))
        self.complete()

    # ---- the work

    def _arguments(self, begin: Callable[[], Emit]) -> Reads[None]:
        """`begin` is called when it is certain that there are arguments: an object, an object as text, or null."""
        char = yield from self.tape.peek()
        if char == "{":
            yield from copy_value(self.tape, begin())
            return
        text = "{}"
        if char == '"':
            text = yield from read_string(self.tape)
            if not _is_object(text):
                raise Malformed
        else:
            yield from self.tape.expect("null")
        begin()(text)

    def _read(self) -> Reads[None]:
        tape = self.tape
        while opener := (yield from self._text_up_to_opener()):
            self._is_certain = False
            calls_before = self.num_calls
            try:
                yield from self.call(opener)
            except Malformed as wrong:
                is_another = calls_before > 0 and opener in self.MARKERS
                if isinstance(wrong, CutOff) and (is_another or self.num_calls > calls_before):
                    return  # what closes the notation is missing, or more of a further call: no text in any case
                # Marked: what follows the mark is text after all, though after its first character may come a call.
                if tape.rewind() and (yield from tape.peek()):
                    self._say(tape.take())
            tape.unmark()
        if not (self.num_calls and self._at_beginning):
            self._say("")

    def _text_up_to_opener(self) -> Reads[str]:
        """Gives out text. Returns the opener that was taken, with the mark before it; "" at the end."""
        tape = self.tape
        while char := (yield from tape.peek()):
            if text := tape.run(self._prose):
                if said := text.rstrip():
                    self._say(said)
                self._pending += text[len(said) :]
                continue
            tape.mark()
            for marker in self.MARKERS:
                if (yield from tape.literal(marker)):
                    return marker
            tape.unmark()
            if self.num_calls and self._at_beginning and any(map(tape.is_cut_off_in, self.MARKERS)):
                return ""
            if char in self.BARE and (self._at_beginning or "\n" in self._pending):
                tape.mark()
                return tape.take()
            self._say(tape.take())
        return ""

    def _say(self, text: str) -> None:
        """Text, with the spaces that were before it, unless those only part it from a call."""
        text = self._pending + text
        self.tape.parts.append(Answer(text if self._has_said or not self.num_calls else text.lstrip()))
        self._pending = ""
        self._has_said, self._at_beginning = True, False


def _keep(kept: list[str]) -> Emit:
    return kept.append


def _ignore(text: str) -> None:
    pass


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


class OneCall:
    """A Reader that passes on what `reader` reads, but of its calls only the first: the model may not make more."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def push(self, text: str, ended: bool) -> list[Part]:
        parts = self._reader.push(text, ended)
        return [part for part in parts if not isinstance(part, (CallBegun, CallArguments)) or part.index == 0]
