"""Requests whose form is being compiled: they are queued, and in nobody's way.

Knows requests and futures. The compiling itself goes on elsewhere, and may take as long as COMPILE_S.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from octavo.engine.core.constraints import Grammar, Grammars
from octavo.engine.errors import OctavoError, RequestError
from octavo.engine.grammar.spec import StructuredOutputs
from octavo.engine.types import Request

COMPILE_S = 30.0


@dataclass(frozen=True, slots=True)
class _Begun:
    request: Request
    grammar: Future[Grammar]
    until: float


class Compiling:
    """In the order in which they came."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._begun: dict[str, _Begun] = {}

    def __len__(self) -> int:
        """Sequences of all requests."""
        return sum(len(begun.request.sequences) for begun in self._begun.values())

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._begun

    def prepare(self, specs: Sequence[StructuredOutputs]) -> None:
        """Compile, and wait for it. Raises RequestError for a form that cannot be used."""
        for grammar in [self._grammars.compile(spec) for spec in specs]:
            grammar.result()

    def begin(self, request: Request) -> Grammar | None:
        """The grammar, if it is compiled already. None: `ready` will tell. Raises RequestError for a form that is known
        to be of no use."""
        assert request.params.structured_outputs is not None
        grammar = self._grammars.compile(request.params.structured_outputs)
        if grammar.done():
            return grammar.result()
        self._begun[request.request_id] = _Begun(request, grammar, time.monotonic() + COMPILE_S)
        return None

    def ready(self) -> Iterator[tuple[Request, Grammar | OctavoError]]:
        """Take out those that need to wait no longer."""
        now = time.monotonic()
        for request_id, begun in list(self._begun.items()):
            if begun.grammar.done() or now > begun.until:
                del self._begun[request_id]
                yield begun.request, _result(begun.grammar)

    def drop(self, request_id: str) -> Request | None:
        """Take one out. Others may wait for the same grammar, so it is compiled all the same."""
        begun = self._begun.pop(request_id, None)
        return begun.request if begun is not None else None

    def wait(self, timeout_s: float) -> None:
        """Until one is ready, or the time is over."""
        wait([begun.grammar for begun in self._begun.values()], timeout_s, FIRST_COMPLETED)

    def close(self) -> None:
        self._grammars.close()


def _result(grammar: Future[Grammar]) -> Grammar | OctavoError:
    if not grammar.done():
        return RequestError(f"The form was not compiled within {COMPILE_S:g} s.", "structured_outputs")
    error = grammar.exception()
    if error is None:
        return grammar.result()
    return error if isinstance(error, OctavoError) else RequestError(f"{type(error).__name__}: {error}")
