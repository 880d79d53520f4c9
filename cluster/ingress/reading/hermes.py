"""Hermes's notation, which Qwen2.5, Qwen3 and many others use: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

SmolLM2 writes a list of calls between the tags.
"""

from __future__ import annotations

import re

from octavo.cluster.ingress.reading.calls import CallReader
from octavo.cluster.ingress.reading.tape import Malformed, Reads

# Small models lose count of brackets; the tag says that the call is over.
_STRAY = re.compile(r"[\s}\]]*")


class HermesReader(CallReader):
    MARKERS = ("<tool_call>",)

    def call(self, opener: str) -> Reads[None]:
        tape = self.tape
        yield from tape.spaces()
        try:
            yield from (self.json_calls() if (yield from tape.peek()) == "[" else self.json_call())
        except Malformed:
            if not self.is_complete:
                raise
            tape.rewind()
            self.complete()
        yield from tape.all_of(_STRAY)
        yield from tape.expect("</tool_call>")
