"""From texts to the requests that pool them: prompts before a text, pairs of texts, cutting, limits on length.

What LLM and the ingress share. No torch, no HTTP. An error names the input it is about by `param`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import TypeIs

from octavo.engine.errors import RequestError
from octavo.engine.params import SamplingParams
from octavo.engine.pooling.info import PoolingInfo
from octavo.engine.pooling.params import PoolingParams
from octavo.engine.text.marked import Marked, Side
from octavo.engine.text.tokenizer import Tokenizer
from octavo.engine.types import EngineInfo, Request

# Of a request that generates nothing.
NOTHING_DRAWN = SamplingParams(temperature=0.0, max_tokens=1, seed=0)

# A text, two that are read together, or tokens.
Input = str | tuple[str, str] | Sequence[int]


@dataclass(frozen=True, slots=True)
class Fitting:
    """How long a prompt may be, and what becomes of a longer one. keep: it is cut to so many tokens, -1 = as many as
    the model takes; None = refused. side: where it is cut. special: with the tokens that the tokenizer puts around.
    most: tokens that are allowed here, if that is less than the model takes.
    """

    keep: int | None = None
    side: Side = "right"
    special: bool = True
    most: int | None = None


class PromptFitter:
    """Makes token ids for one model. Raises RequestError for what cannot become a prompt."""

    def __init__(self, tokenizer: Tokenizer, info: EngineInfo, fitting: Fitting) -> None:
        self._tokenizer, self._info, self._fitting = tokenizer, info, fitting
        self._limit = min(info.max_model_len, fitting.most or info.max_model_len)
        keep = fitting.keep
        if keep is not None and (keep < -1 or keep == 0 or keep > self._limit):
            raise RequestError(
                f"truncate_prompt_tokens must be -1 or an integer between 1 and {self._limit}, got {keep}.",
                "truncate_prompt_tokens",
            )
        self._keep = self._limit if keep == -1 else keep

    def of_inputs(self, inputs: Sequence[Input], params: Sequence[str], before: str = "") -> list[tuple[int, ...]]:
        """Token ids of each. params: what each is called in an error. before: put before what is a text of its own."""
        texts: list[tuple[str] | tuple[str, str]] = []
        for each in inputs:
            if isinstance(each, str):
                texts.append((before + each,))
            elif _is_pair(each):
                texts.append(each)
        marked = iter(self._tokenizer.mark_batch(texts, add_special_tokens=self._fitting.special) if texts else ())
        return [
            self._of_marked(next(marked), param)
            if isinstance(each, str) or _is_pair(each)
            else self._of_ids(each, param)
            for each, param in zip(inputs, params, strict=True)
        ]

    def _of_ids(self, ids: Sequence[int], param: str) -> tuple[int, ...]:
        for token in ids:
            if not 0 <= token < self._info.vocab_size:
                raise RequestError(f"{param}: token id {token} is not in [0, {self._info.vocab_size}).", param)
        if self._keep is not None and len(ids) > self._keep:
            ids = ids[: self._keep] if self._fitting.side == "right" else ids[-self._keep :]
        return self._checked(tuple(ids), param)

    def _of_marked(self, marked: Marked, param: str) -> tuple[int, ...]:
        if self._keep is not None:
            marked = marked.fit(self._keep, self._fitting.side)
        last = self._info.pooling.pair_types - 1
        if not last:
            return self._checked(tuple(marked.ids), param)
        size = self._info.vocab_size
        ids = (token + size * min(kind, last) for token, kind in zip(marked.ids, marked.types, strict=True))
        return self._checked(tuple(ids), param)

    def _checked(self, ids: tuple[int, ...], param: str) -> tuple[int, ...]:
        if not ids:
            raise RequestError(f"{param} is empty: it has no tokens.", param)
        if len(ids) > self._limit:
            what = "this model takes" if self._limit == self._info.max_model_len else "this server takes"
            raise RequestError(
                f"{param} is {len(ids)} tokens long, but {what} at most {self._limit}; truncate_prompt_tokens cuts it.",
                param,
            )
        return ids


def _is_pair(each: Input) -> TypeIs[tuple[str, str]]:
    return isinstance(each, tuple) and len(each) == 2 and isinstance(each[0], str)


def prompted(info: PoolingInfo, name: str | None) -> str:
    """What is to be put before every text. name: of one of the model's prompts; None = its default, if it has one.

    Raises RequestError if there is none of that name.
    """
    name = info.default_prompt if name is None else name
    if name is None:
        return ""
    for known, text in info.prompts:
        if known == name:
            return text
    names = ", ".join(known for known, _ in info.prompts) or "none"
    raise RequestError(f"The model has no prompt {name!r}; there are: {names}.", "prompt_name")


def pooling_request(
    request_id: str,
    prompts: Sequence[tuple[int, ...]],
    pooling: PoolingParams,
    *,
    priority: int = 0,
    cache_salt: str | None = None,
    arrival_time: float | None = None,
    session_id: str | None = None,
) -> Request:
    """Pools every prompt, of which there is at least one. pooling: resolved."""
    return Request(
        request_id=request_id,
        prompt_token_ids=prompts[0],
        more_prompts=tuple(prompts[1:]),
        params=NOTHING_DRAWN,
        priority=priority,
        cache_salt=cache_salt,
        arrival_time=time.monotonic() if arrival_time is None else arrival_time,
        session_id=session_id,
        pooling=pooling,
    )
