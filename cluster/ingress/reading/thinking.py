"""What a model thinks, `<think> … </think>`, before it answers; and how many tokens it thinks.

The prompt may have opened the thought, or closed it before it began. Spaces around a thought belong to the notation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from octavo.cluster.ingress.reading.parts import Part, Reader, Reasoning
from octavo.cluster.ingress.reading.tape import Reads, Tape

_NOT_TAG = re.compile(r"[^<]*")
_ALL = re.compile(r"(?s).*")


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a family of models marks its thoughts. always: an answer begins with one, though nothing may open it."""

    begin: str = "<think>"
    end: str = "</think>"
    always: bool = False

    def is_open_after(self, prompt: str) -> bool:
        """Whether an answer to `prompt` begins inside a thought."""
        prompt = prompt.rstrip()
        return prompt.endswith(self.begin) or (self.always and not prompt.endswith(self.end))

    def is_over_after(self, prompt: str) -> bool:
        """Whether `prompt` ends with a thought that is closed: the answer has none."""
        return prompt.rstrip().endswith(self.end)


class ThinkingReader:
    """A Reader (see parts.py): a thought, if there is one, and then what `then` reads.

    is_open: the prompt has opened the thought. shown: whether the thought is to be seen.
    """

    def __init__(self, thinking: Thinking, then: Reader, *, is_open: bool, shown: bool = True) -> None:
        self._thinking = thinking
        self._then = then
        self._is_open = is_open
        self._shown = shown
        self._tape = Tape()
        self._has_answer = False  # what the tape brings now is the answer
        self._work = self._read()

    def push(self, text: str, ended: bool) -> list[Part]:
        if self._has_answer:
            return self._then.push(text, ended)
        self._tape.add(text, ended)
        next(self._work, None)
        thoughts = self._tape.found() if self._shown else []
        if self._has_answer:
            return [*thoughts, *self._then.push(self._tape.run(_ALL), ended)]
        return thoughts

    def _read(self) -> Reads[None]:
        tape = self._tape
        spaces = yield from tape.spaces()
        if (yield from tape.literal(self._thinking.begin)):
            spaces = yield from tape.spaces()
        elif not self._is_open:
            tape.back(spaces)
            self._has_answer = True
            return
        spaces = ""
        while not (yield from tape.literal(self._thinking.end)):
            if not (yield from tape.peek()):
                self._think(spaces)
                return
            text = tape.run(_NOT_TAG) or tape.take()
            said = text.rstrip()
            if said:
                self._think(spaces + said)
                spaces = ""
            spaces += text[len(said) :]
        yield from tape.spaces()
        self._has_answer = True

    def _think(self, text: str) -> None:
        self._tape.parts.append(Reasoning(text))


class ThoughtCounter:
    """Counts the tokens of a thought, its marks left out. Does nothing where a mark is more than one token."""

    def __init__(self, begin: int | None, end: int | None, *, is_open: bool) -> None:
        self.num_tokens = 0
        self._begin, self._end = begin, end
        self._is_open = is_open and end is not None
        self._is_over = end is None

    def push(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            if self._is_over:
                return
            if token == self._end:
                self._is_over = True
            elif token == self._begin:
                self._is_open = True
            elif self._is_open:
                self.num_tokens += 1
