"""What a request's form (StructuredOutputs) means for the scheduler: a Constraint follows each of its sequences.

Knows tokens, masks as bytes and what a grammar answers. Does not know grammars: octavo.engine.grammar has them, and
NoGrammars stands in where there are none. What a constraint says depends on the sequence's tokens alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from octavo.engine.errors import RequestError
from octavo.engine.grammar.spec import StructuredOutputs

# Forced tokens from which it pays to skip the draws: with one, the step in flight has drawn it already.
LEAST_JUMP = 2


class Matcher(Protocol):
    """One output's place in a grammar. Never raises: once `error` says something, it has no more to say."""

    def take(self, token: int) -> None:
        """The output goes on with `token`."""

    def forced(self) -> Sequence[int]:
        """Tokens that must come next, in this order; empty where there is a choice."""

    def mask(self) -> bytes:
        """The tokens that may come next, as bits: token t is bit t % 8 of byte t // 8."""

    @property
    def ended(self) -> bool:
        """Nothing may follow but the end token."""

    @property
    def error(self) -> str | None:
        """Why it cannot go on: a token that may not come, or a limit."""


class Grammar(Protocol):
    """A form, compiled. Shared by requests that ask for the same."""

    def matcher(self) -> Matcher:
        """At the beginning of an output."""


class Grammars(Protocol):
    """Compiles forms, away from the steps."""

    def compile(self, spec: StructuredOutputs) -> Future[Grammar]:
        """Returns at once. The future raises RequestError for a form that cannot be used."""

    def close(self) -> None:
        """Drop what is not compiled yet."""


class NoGrammars:
    """Where structured output is not to be had."""

    def compile(self, spec: StructuredOutputs) -> Future[Grammar]:
        future: Future[Grammar] = Future()
        future.set_exception(RequestError("This engine has no structured output.", "structured_outputs"))
        return future

    def close(self) -> None:
        """There is nothing to drop."""


class Constraint:
    """Follows one sequence. forced: tokens known to come next; draws of them have no choice.

    It sleeps until the output has had `begins_after` in it; till then everything is allowed.
    """

    __slots__ = ("_asleep", "_begins_after", "_matcher", "_newest", "forced")

    def __init__(self, grammar: Grammar, begins_after: tuple[int, ...], output: Sequence[int]) -> None:
        self._matcher = grammar.matcher()
        self._begins_after = begins_after
        self._newest: deque[int] = deque(maxlen=len(begins_after))
        self._asleep = bool(begins_after)
        self.forced: deque[int] = deque(() if self._asleep else self._matcher.forced())
        for token in output:
            self.follow(token)

    def follow(self, token: int) -> None:
        """The sequence has one more token."""
        if self._asleep:
            self._newest.append(token)
            if tuple(self._newest) != self._begins_after:
                return
            self._asleep = False
        else:
            self._matcher.take(token)
            if self.forced and self.forced.popleft() == token and self.forced:
                return
        self.forced = deque(self._matcher.forced())

    @property
    def ended(self) -> bool:
        return not self._asleep and not self.forced and self._matcher.ended

    @property
    def error(self) -> str | None:
        return self._matcher.error

    def mask(self, num_bytes: int) -> bytes:
        """What may come next, in num_bytes bytes (see Matcher.mask); empty = everything."""
        if self._asleep or self.error is not None:
            return b""
        if self.forced:
            return (1 << self.forced[0]).to_bytes(num_bytes, "little")
        mask = self._matcher.mask()
        if self.error is not None:  # the sequence ends with it once its token is there
            return b""
        return mask[:num_bytes].ljust(num_bytes, b"\0")
