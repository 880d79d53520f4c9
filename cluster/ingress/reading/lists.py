"""Calls as a JSON list behind a marker, and as nothing but a list: Phi-4-mini's notation, and that of calls which are
enforced where a model's own notation is not known (vLLM's, too).
"""

from __future__ import annotations

from octavo.cluster.ingress.reading.calls import CallReader
from octavo.cluster.ingress.reading.tape import Reads


class JsonListReader(CallReader):
    """`[{"name": …, "parameters": {…}}, …]` at the beginning of a line, with tools that are offered."""

    BARE = "["

    def call(self, opener: str) -> Reads[None]:
        self.tape.back(opener)
        yield from self.json_calls(known_only=True)


class PhiReader(CallReader):
    """`functools[…]` or `<|tool_call|>[…]<|/tool_call|>`."""

    MARKERS = ("functools", "<|tool_call|>")

    def call(self, opener: str) -> Reads[None]:
        yield from self.tape.spaces()
        yield from self.json_calls()
        if opener == "<|tool_call|>":
            yield from self.tape.spaces()
            yield from self.tape.expect("<|/tool_call|>")
