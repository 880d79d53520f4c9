"""CompiledGrammars: compiles forms on threads of its own, and remembers what it compiled.

The engine's Grammars (core/constraints.py); an ingress has one too, to find faults early. Knows threads and llguidance.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from octavo.engine.core.constraints import Grammar, Matcher
from octavo.engine.errors import OctavoError, RequestError
from octavo.engine.grammar.spec import StructuredOutputs
from octavo.engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

THREADS = 2
# A schema's definitions may follow one another through a megabyte of text, and llguidance recurses: on eight megabytes
# of stack a thousand of them end the process. Only address space, until it is used.
STACK_BYTES = 512 << 20
MAX_KEPT = 128  # compiled forms
MAX_KEPT_CHARS = 16 << 20  # of their texts


class CompiledGrammars:
    """load: the tokenizer, called once, when the first form comes; vocab_size, eos_token_ids: the model's. `compile` is
    for one thread.
    """

    def __init__(self, load: Callable[[], Tokenizer], vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._load, self._vocab_size, self._eos_token_ids = load, vocab_size, eos_token_ids
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()  # of the tokenizer
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[StructuredOutputs, Future[Grammar]] = OrderedDict()
        self._chars = 0

    def compile(self, spec: StructuredOutputs) -> Future[Grammar]:
        key = spec.replace(begins_after=()) if spec.begins_after else spec
        found = self._kept.get(key)
        if found is None or found.cancelled():
            if self._pool is None:
                self._pool = _roomy_pool()
            found = self._kept[key] = self._pool.submit(self._compile, key)
            self._chars += key.num_chars
            while len(self._kept) > 1 and (len(self._kept) > MAX_KEPT or self._chars > MAX_KEPT_CHARS):
                old, _ = self._kept.popitem(last=False)
                self._chars -= old.num_chars
        self._kept.move_to_end(key)
        return found

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
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


def _roomy_pool() -> ThreadPoolExecutor:
    """Threads start when work comes and all are busy, with the stack size of that moment: so all are started here."""
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="octavo-grammars")
    everyone_is_here = threading.Barrier(THREADS + 1)
    before = threading.stack_size(STACK_BYTES)
    try:
        for _ in range(THREADS):
            pool.submit(everyone_is_here.wait)
    finally:
        threading.stack_size(before)
    everyone_is_here.wait()
    return pool
