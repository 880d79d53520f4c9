"""Mistral's notations: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, and in newer models, once per call,
`[TOOL_CALLS]name[ARGS]{…}`, without [ARGS] in some.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from octavo.cluster.ingress.reading.calls import CallReader, Offer, short_call_id
from octavo.cluster.ingress.reading.tape import Malformed, Reads

_NAME = re.compile(r"[\w.-]*")


class MistralReader(CallReader):
    MARKERS = ("[TOOL_CALLS]",)

    def __init__(self, offer: Offer, new_id: Callable[[], str] = short_call_id) -> None:
        super().__init__(offer, new_id)

    def call(self, opener: str) -> Reads[None]:
        tape = self.tape
        yield from tape.spaces()
        if (yield from tape.peek()) == "[":
            yield from self.json_calls()
            return
        name = yield from tape.all_of(_NAME)
        if not name:
            raise Malformed
        if (yield from tape.literal("[CALL_ID]")):
            yield from tape.all_of(_NAME)  # answers carry ids of ours
        yield from tape.literal("[ARGS]")
        yield from tape.spaces()
        yield from self.json_arguments(name)
