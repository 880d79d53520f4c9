"""Llama 3's notation: `{"name": …, "parameters": {…}}` on lines of its own, several with `;` between them, and perhaps
`<|python_tag|>` before.

Nothing marks such a call, so it is one only if the tool is offered.
"""

from __future__ import annotations

from octavo.cluster.ingress.reading.calls import CallReader
from octavo.cluster.ingress.reading.tape import Reads


class LlamaJsonReader(CallReader):
    MARKERS = ("<|python_tag|>",)
    BARE = "{"

    def call(self, opener: str) -> Reads[None]:
        tape = self.tape
        if opener == "{":
            tape.back(opener)
        while True:
            yield from tape.spaces()
            yield from self.json_call(known_only=True)
            if not (yield from self.another(";")):
                return
