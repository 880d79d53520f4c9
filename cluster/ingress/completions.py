"""The shapes of /v1/completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from octavo.cluster.ingress import replies
from octavo.cluster.ingress.errors import Failure
from octavo.cluster.ingress.generation import Generation, Piece, join
from octavo.cluster.ingress.logprobs import TokenNames, completion_logprobs, prompt_logprobs
from octavo.cluster.ingress.protocol import CompletionBody
from octavo.cluster.ingress.sampling import only_scores
from octavo.engine.types import TokenLogprobs


class CompletionDialect:
    """`prompt_texts[i]` is prompt i, for a client that wants to have it back."""

    form = replies.DATA_EVENTS

    def __init__(
        self,
        body: CompletionBody,
        generation: Generation,
        prompt_texts: Sequence[str],
        names: TokenNames,
        *,
        answer_id: str,
        model: str,
        created: int,
    ) -> None:
        self._body = body
        self._generation = generation
        self._prompt_texts = prompt_texts
        self._names = names
        self._head = {"id": answer_id, "object": "text_completion", "created": created, "model": model}
        options = body.stream_options
        self._usage_null = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        self._scores = only_scores(body)
        self._offsets = [0] * len(generation.choices)

    def opening(self) -> Iterable[dict[str, Any]]:
        return ()

    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]:
        chunk = {**self._head, "choices": [self._choice(piece)]}
        if self._usage_always:
            chunk["usage"] = self._generation.usage()
        elif self._usage_null:
            chunk["usage"] = None
        return (chunk,)

    def closing(self, usage: dict[str, Any]) -> Iterable[dict[str, Any]]:
        return ({**self._head, "choices": [], "usage": usage},) if self._usage_null else ()

    def failed(self, failure: Failure) -> Iterable[dict[str, Any]]:
        return (failure.body,)

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "choices": [self._choice(join(some)) for some in pieces], "usage": usage}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        body = self._body
        text = "" if self._scores else piece.text
        if body.echo and piece.first:
            text = self._prompt_texts[piece.index // self._generation.n] + text
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": text,
            "logprobs": None if body.logprobs is None else self._logprobs(piece),
            "finish_reason": "length" if self._scores and piece.finish_reason else piece.finish_reason,
            "stop_reason": None if self._scores else piece.stop_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = [] if self._scores else list(piece.token_ids)
            if piece.first:
                choice["prompt_token_ids"] = list(self._prompt_ids(piece))
        if body.return_prompt_text and piece.first:
            choice["prompt_text"] = self._prompt_texts[piece.index // self._generation.n]
        if body.prompt_logprobs is not None and piece.first:
            choice["prompt_logprobs"] = prompt_logprobs(self._of_prompt(piece), self._names)
        return choice

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        tokens: list[int] = [] if self._scores else list(piece.token_ids[: len(piece.logprobs)])
        entries: list[TokenLogprobs | None] = [] if self._scores else list(piece.logprobs)
        if self._body.echo and piece.first:
            tokens = [*self._prompt_ids(piece), *tokens]
            entries = [*self._of_prompt(piece), *entries]
        result, self._offsets[piece.index] = completion_logprobs(
            entries, tokens, self._offsets[piece.index], self._names, bool(self._body.return_tokens_as_token_ids)
        )
        return result

    def _prompt_ids(self, piece: Piece) -> Sequence[int]:
        return self._generation.prompts[piece.index // self._generation.n].token_ids

    def _of_prompt(self, piece: Piece) -> Sequence[TokenLogprobs | None]:
        return self._generation.prompt_logprobs[piece.index // self._generation.n]
