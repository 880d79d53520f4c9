"""From what a user passes (text or token ids, SamplingParams) to a Request."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Sequence

from octavo.engine.errors import RequestError
from octavo.engine.params import SamplingParams
from octavo.engine.text.bad_words import bad_words_token_ids
from octavo.engine.text.tokenizer import Tokenizer
from octavo.engine.types import Request

Prompt = str | Sequence[int]

_numbers = itertools.count()


def new_request_id() -> str:
    """An id unique in this process, readable in logs."""
    return f"req-{next(_numbers)}-{secrets.token_hex(4)}"


def new_seed() -> int:
    """A seed for a request that named none: drawn once, so that a resubmission draws the same tokens."""
    return secrets.randbits(63)


def make_request(
    tokenizer: Tokenizer,
    prompt: Prompt,
    params: SamplingParams,
    request_id: str | None = None,
    *,
    priority: int = 0,
    cache_salt: str | None = None,
) -> Request:
    """Tokenize what is text, resolve what is open. Raises RequestError for a prompt of another type."""
    if isinstance(prompt, str):
        token_ids: Sequence[int] = tokenizer.encode(prompt)
    elif isinstance(prompt, Sequence) and all(isinstance(t, int) and not isinstance(t, bool) for t in prompt):
        token_ids = prompt
    else:
        raise RequestError("A prompt must be a string or a list of token ids.", "prompt")
    if params.seed is None:
        params = params.replace(seed=new_seed())
    return Request(
        request_id=request_id or new_request_id(),
        prompt_token_ids=tuple(token_ids),
        params=params,
        priority=priority,
        cache_salt=cache_salt,
        arrival_time=time.monotonic(),
        bad_words_token_ids=bad_words_token_ids(tokenizer, params.bad_words),
    )
