"""Log probabilities in the three forms clients know: completions', chat's, and vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from octavo.cluster.ingress.replies import finite
from octavo.engine.text.tokenizer import Tokenizer
from octavo.engine.types import TokenLogprobs


class TokenNames:
    """Tokens as clients see them: text, or `token_id:N` where they ask for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._text = lru_cache(maxsize=1 << 16)(tokenizer.token_text)
        self.raw = tokenizer.token_bytes

    def text(self, token: int) -> str:
        return self._text(token)

    def name(self, token: int, as_id: bool) -> str:
        return f"token_id:{token}" if as_id else self._text(token)


def chat_logprobs(entries: Sequence[TokenLogprobs], top: int, names: TokenNames, as_ids: bool) -> dict[str, Any]:
    def candidate(token: int, logprob: float) -> dict[str, Any]:
        return {"token": names.name(token, as_ids), "logprob": finite(logprob), "bytes": list(names.raw(token))}

    content = []
    for entry in entries:
        drawn, *best = zip(entry.token_ids, entry.logprobs, strict=True)
        content.append({**candidate(*drawn), "top_logprobs": [candidate(*pair) for pair in best[:top]]})
    return {"content": content, "refusal": None}


def completion_logprobs(
    entries: Sequence[TokenLogprobs | None], token_ids: Sequence[int], offset: int, names: TokenNames, as_ids: bool
) -> tuple[dict[str, Any], int]:
    """`entries[i]` belongs to `token_ids[i]` (None: nothing comes before it). `offset`: characters before the first.

    Returns the offset after the last one too.
    """
    tokens, logprobs, tops, offsets = [], [], [], []
    for token, entry in zip(token_ids, entries, strict=True):
        tokens.append(names.name(token, as_ids))
        offsets.append(offset)
        offset += len(names.text(token))
        logprobs.append(None if entry is None else finite(entry.logprobs[0]))
        tops.append(None if entry is None else _by_name(entry, names, as_ids))
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}, offset


def _by_name(entry: TokenLogprobs, names: TokenNames, as_ids: bool) -> dict[str, float]:
    """Two tokens can have one text (parts of characters, mostly): the more likely one is shown."""
    result: dict[str, float] = {}
    for token, logprob in zip(entry.token_ids, entry.logprobs, strict=True):
        name = names.name(token, as_ids)
        result[name] = max(finite(logprob), result.get(name, finite(logprob)))
    return result


def prompt_logprobs(entries: Sequence[TokenLogprobs | None], names: TokenNames) -> list[dict[str, Any] | None]:
    """vLLM's form: per prompt token, token id → logprob, rank and text; the first is None."""
    return [None if entry is None else _ranked(entry, names) for entry in entries]


def _ranked(entry: TokenLogprobs, names: TokenNames) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for rank, (token, logprob) in enumerate(zip(entry.token_ids, entry.logprobs, strict=True)):
        # the first one's rank is its own; the others follow in descending order from rank 1
        if str(token) not in result:
            result[str(token)] = {
                "logprob": finite(logprob),
                "rank": entry.rank if rank == 0 else rank,
                "decoded_token": names.text(token),
            }
    return result
