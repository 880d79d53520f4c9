"""Calls as a Python list of calls, `[f(a=1), g(b="x")]`, as Llama 3.2 and 4 write them, the latter also between
<|python_start|> and <|python_end|>.

Only tools that are offered can be called, since nothing need mark such a list.
"""

from __future__ import annotations

import json
import re

from octavo.cluster.ingress.reading.calls import CallReader
from octavo.cluster.ingress.reading.python_text import copy_as_json
from octavo.cluster.ingress.reading.tape import Malformed, Reads

_NAME = re.compile(r"[\w.-]*")
_ARGUMENT = re.compile(r"\w*")


class PythonicReader(CallReader):
    MARKERS = ("<|python_start|>",)
    BARE = "["

    def call(self, opener: str) -> Reads[None]:
        tape = self.tape
        if opener != "[":
            yield from tape.spaces()
            yield from tape.expect("[")
        while True:
            yield from tape.spaces()
            yield from self._one_call()
            if not (yield from self.another(",")):
                break
        yield from tape.expect("]")
        if opener != "[":
            yield from tape.spaces()
            yield from tape.literal("<|python_end|>")

    def _one_call(self) -> Reads[None]:
        tape = self.tape
        name = yield from tape.all_of(_NAME)
        if name not in self.offer:
            raise Malformed
        yield from tape.spaces()
        yield from tape.expect("(")
        yield from tape.spaces()
        argument = yield from self._argument()
        emit = self.begin(name)
        emit("{")
        while argument:
            emit(json.dumps(argument, ensure_ascii=False) + ": ")
            yield from copy_as_json(tape, emit)
            yield from tape.spaces()
            comma = yield from tape.literal(",")
            yield from tape.spaces()
            argument = yield from self._argument()
            if argument and not comma:
                raise Malformed
            if argument:
                emit(", ")
        emit("}")
        self.complete()

    def _argument(self) -> Reads[str]:
        """The name of the next argument, up to its value; "" behind the last one."""
        tape = self.tape
        if (yield from tape.literal(")")):
            return ""
        name = yield from tape.all_of(_ARGUMENT)
        yield from tape.spaces()
        yield from tape.expect("=")
        if not name:
            raise Malformed
        return name
