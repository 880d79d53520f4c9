"""CompiledGrammars: compiles forms on threads of its own, and remembers what it compiled.

The engine's Grammars (core/constraints.py); an ingress has one too, to find faults early. Knows threads and llguidance.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from octavo.engine.core.constraints import Grammar, Matcher
from octavo.engine.errors import OctavoError, RequestError
from octavo.engine.grammar.spec import StructuredOutputs
from octavo.engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

log = logging.getLogger(__name__)

THREADS = 2
# A schema's definitions may follow one another through a megabyte of text, and llguidance recurses: on eight megabytes
# of stack a thousand of them end the process. Only address space, until it is used.
STACK_BYTES = (512 << 20, 64 << 20, 0)  # as much as is to be had
MAX_KEPT = 128  # compiled forms
MAX_KEPT_CHARS = 16 << 20  # of their texts


class CompiledGrammars:
    """load: the tokenizer, called once, when the first form comes; vocab_size, eos_token_ids: the model's. `compile` is
    for one thread.
    """

    def __init__(self, load: Callable[[], Tokenizer], vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._load, self._vocab_size, self._eos_token_ids = load, vocab_size, eos_token_ids
        self._workers: _Workers | None = None
        self._lock = threading.Lock()  # of the tokenizer
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[StructuredOutputs, Future[Grammar]] = OrderedDict()
        self._chars = 0

    def compile(self, spec: StructuredOutputs) -> Future[Grammar]:
        found = self._kept.get(spec)
        if found is None:
            if self._workers is None:
                self._workers = _Workers()
            found = self._kept[spec] = self._workers.submit(lambda: self._compile(spec))
            self._chars += spec.num_chars
            while len(self._kept) > 1 and (len(self._kept) > MAX_KEPT or self._chars > MAX_KEPT_CHARS):
                old, _ = self._kept.popitem(last=False)
                self._chars -= old.num_chars
        self._kept.move_to_end(spec)
        return found

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()
            self._workers = None
        self._kept.clear()
        self._chars = 0

    def _compile(self, spec: StructuredOutputs) -> Grammar:
        from octavo.engine.grammar.compiler import compile_form
        from octavo.engine.grammar.tokens import grammar_tokenizer

        try:
            with self._lock:
                if self._tokenizer is None:
                    self._tokenizer = grammar_tokenizer(self._load(), self._vocab_size, self._eos_token_ids)
            return CompiledGrammar(compile_form(spec, self._tokenizer))
        except OctavoError:
            raise
        except BaseException as error:  # a panic in llguidance, too
            raise RequestError(
                f"structured_outputs.{spec.kind} cannot be used: {error}.", f"structured_outputs.{spec.kind}"
            ) from error


class CompiledGrammar:
    """A matcher at the beginning, of which every output gets a copy."""

    def __init__(self, beginning: LLMatcher) -> None:
        self._beginning = beginning

    def matcher(self) -> Matcher:
        return GrammarMatcher(self._beginning.deep_copy())


class GrammarMatcher:
    """A Matcher of llguidance's."""

    __slots__ = ("_matcher",)

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)

    def forced(self) -> Sequence[int]:
        if self._matcher.is_stopped():
            return ()
        tokens = self._matcher.compute_ff_tokens()
        # Some tokenizers put a space before a text that is cut by itself: what does not fit is not forced.
        return tokens[: self._matcher.validate_tokens(tokens)] if tokens else ()

    def mask(self) -> bytes:
        return self._matcher.compute_bitmask()

    @property
    def ended(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        if not self._matcher.is_error():
            return None
        reason = self._matcher.get_error().strip().removesuffix("<non-verbose/>").strip()
        return f"The form of the output cannot be followed further: {reason[:400]}."


class _Workers:
    """Threads with room for deep recursion. Nobody waits for them at the end of the process."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Grammar], Callable[[], Grammar]] | None] = queue.SimpleQueue()
        for number in range(THREADS):
            self._start(f"octavo-grammars-{number}")

    def submit(self, make: Callable[[], Grammar]) -> Future[Grammar]:
        future: Future[Grammar] = Future()
        self._jobs.put((future, make))
        return future

    def close(self) -> None:
        for _ in range(THREADS):
            self._jobs.put(None)

    def _start(self, name: str) -> None:
        for stack_bytes in STACK_BYTES:
            before = threading.stack_size(stack_bytes)  # of the threads that start from now on, whoever starts them
            try:
                threading.Thread(target=self._work, name=name, daemon=True).start()
                return
            except RuntimeError:  # there is no room for such a stack
                continue
            finally:
                threading.stack_size(before)
        log.warning("the thread %s could not be started: forms are compiled by fewer, or not at all", name)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, make = job
            try:
                future.set_result(make())
            except BaseException as error:
                future.set_exception(error)
