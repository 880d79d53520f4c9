"""DeepSeek's notations, between <｜tool▁calls▁begin｜> and <｜tool▁calls▁end｜>.

V3 and R1: `<｜tool▁call▁begin｜>function<｜tool▁sep｜>name`, and the arguments as a block of JSON in Markdown. V3.1:
`<｜tool▁call▁begin｜>name<｜tool▁sep｜>{…}<｜tool▁call▁end｜>`.
"""

from __future__ import annotations

import re

from octavo.cluster.ingress.reading.calls import CallReader
from octavo.cluster.ingress.reading.tape import Malformed, Reads

FIRST, LAST = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
BEGIN, SEPARATOR, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_WORD = re.compile(r"[^\s<]*")


class DeepSeekV31Reader(CallReader):
    MARKERS = (FIRST, BEGIN)

    def call(self, opener: str) -> Reads[None]:
        tape = self.tape
        if opener == FIRST:
            yield from tape.spaces()
            yield from tape.expect(BEGIN)
        while True:
            yield from self.one_call()
            yield from tape.spaces()
            yield from tape.expect(END)
            if not (yield from self.another(BEGIN)):
                break
        yield from tape.literal(LAST)

    def one_call(self) -> Reads[None]:
        name = yield from self.word()
        yield from self.tape.expect(SEPARATOR)
        yield from self.tape.spaces()
        yield from self.json_arguments(name)

    def word(self) -> Reads[str]:
        yield from self.tape.spaces()
        word = yield from self.tape.all_of(_WORD)
        if not word:
            raise Malformed
        return word


class DeepSeekV3Reader(DeepSeekV31Reader):
    def one_call(self) -> Reads[None]:
        tape = self.tape
        yield from self.word()  # always "function"
        yield from tape.expect(SEPARATOR)
        name = yield from self.word()
        yield from tape.spaces()
        fenced = yield from tape.literal("```json")
        yield from tape.spaces()
        yield from self.json_arguments(name)
        yield from tape.spaces()
        if fenced:
            yield from tape.expect("```")
