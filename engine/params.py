"""SamplingParams: what a client may ask of the sampler, with vLLM's names, defaults and ranges.

Knows the meaning and the valid range of every field. Does not know tokenizers or tensors: fields that hold text
(`stop`, `bad_words`) are turned into tokens, or checked against text, by `octavo.engine.text`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from typing import Any

from octavo.engine.beam import Beams
from octavo.engine.errors import RequestError
from octavo.engine.grammar.spec import StructuredOutputs

MAX_SEED = 2**63 - 1
# Below this, 1/temperature overflows half precision; vLLM uses the same floor.
MIN_TEMPERATURE = 1e-2
MAX_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 1024

_FLAGS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are drawn and when they end.

    temperature 0 is greedy. `top_k` 0 or -1 keeps all tokens. `seed` None means: the engine draws one, once.
    `logprobs` k returns the k most likely tokens' log probabilities and the drawn token's (k = 0: only the drawn one's;
    -1: the whole vocabulary), taken from the raw logits, before temperature, penalties and masks. `prompt_logprobs`
    likewise for the prompt. `logprob_token_ids`: the candidates are these tokens, whatever k. `max_tokens` None means:
    up to the model's context. `beams`: nothing is drawn, but the n best sequences are searched for; all of their tokens
    come at the end.

    Raises RequestError, naming the field, for a value out of range.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    skip_reading_prefix_cache: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    beams: Beams | None = None
    logprob_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        normalize = object.__setattr__  # a frozen value is normalised once, here, before anybody has seen it
        stop = (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop)
        normalize(self, "stop", stop)
        normalize(self, "stop_token_ids", _items("stop_token_ids", self.stop_token_ids))
        allowed: Any = self.allowed_token_ids
        if isinstance(allowed, list) and not allowed:  # asked for; the default, no restriction, is a tuple
            raise RequestError("allowed_token_ids must not be empty: nothing could be drawn.", "allowed_token_ids")
        normalize(self, "allowed_token_ids", _items("allowed_token_ids", allowed))
        normalize(self, "logprob_token_ids", _items("logprob_token_ids", self.logprob_token_ids))
        normalize(self, "bad_words", _items("bad_words", self.bad_words))
        normalize(self, "logit_bias", _bias(self.logit_bias))
        self._check()
        if self.top_k == -1:
            normalize(self, "top_k", 0)
        if self.seed == -1:
            normalize(self, "seed", None)
        if 0 < self.temperature < MIN_TEMPERATURE:
            normalize(self, "temperature", MIN_TEMPERATURE)

    def _check(self) -> None:
        _integer("n", self.n, 1, 1024)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, low_open=True)
        _number("temperature", self.temperature, 0.0, math.inf)
        _number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _integer("top_k", self.top_k, -1, None)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, None)
        _integer("min_tokens", self.min_tokens, 0, None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens}).", "min_tokens"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), -1, None)
        if self.beams is not None:
            self._check_beams(self.beams)
        elif self.temperature == 0 and self.n > 1:
            raise RequestError("n must be 1 when temperature is 0: all samples would be equal.", "n")
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise RequestError("stop must hold non-empty strings.", "stop")
        if any(not isinstance(s, str) or not s.strip() for s in self.bad_words):
            raise RequestError("bad_words must hold non-empty strings.", "bad_words")
        if self.logprob_token_ids and self.logprobs is None:
            raise RequestError("logprob_token_ids needs logprobs.", "logprob_token_ids")
        if len(self.logprob_token_ids) > MAX_LOGPROB_TOKEN_IDS:
            raise RequestError(
                f"logprob_token_ids must have at most {MAX_LOGPROB_TOKEN_IDS} tokens.", "logprob_token_ids"
            )
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
            for token in getattr(self, name):
                _integer(name, token, 0, None)
        for name in _FLAGS:
            _flag(name, getattr(self, name))
        if self.skip_reading_prefix_cache is not None:
            _flag("skip_reading_prefix_cache", self.skip_reading_prefix_cache)
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutputs):
            raise RequestError("structured_outputs must be a StructuredOutputs.", "structured_outputs")
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need detokenize=true.", "stop")

    def _check_beams(self, beams: Any) -> None:
        """Beams are compared by the model's own log probabilities: what changes these, or looks at text, is refused."""
        if not isinstance(beams, Beams):
            raise RequestError("beams must be of type Beams.", "beams")
        if self.n > beams.width:
            raise RequestError(f"n ({self.n}) must not exceed the beam width ({beams.width}).", "n")
        neutral = {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "structured_outputs": None}
        neutral |= {"logit_bias": {}, "allowed_token_ids": (), "bad_words": (), "stop": (), "logprob_token_ids": ()}
        for name, value in neutral.items():
            if getattr(self, name) != value:
                raise RequestError(f"{name} cannot be combined with beam search.", name)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    def check_vocab(self, vocab_size: int) -> None:
        """Raise RequestError if a token id named here is outside [0, vocab_size)."""
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids", "logit_bias"):
            for token in getattr(self, name):
                if token >= vocab_size:
                    raise RequestError(f"{name}: token id {token} is not below the vocabulary size {vocab_size}.", name)

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with `changes`, validated anew."""
        return dataclasses.replace(self, **changes)


def _items(name: str, value: Any) -> tuple[Any, ...]:
    """A list as a tuple, None as the empty one. A bare string is no list: its letters are not what was meant."""
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise RequestError(f"{name} must be a list, got {_short(value)}.", name)
    return tuple(value)


def _bias(value: Any) -> dict[int, float]:
    """OpenAI sends logit_bias as {"token id as text": bias}; accept that and {int: float}, clamp as vLLM does."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError("logit_bias must map token ids to numbers.", "logit_bias")
    result: dict[int, float] = {}
    for key, bias in value.items():
        # Plain digits only: int() would also take "1_0", " 1" and True.
        text = key if isinstance(key, str) else str(key) if type(key) is int else ""
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise RequestError(f"logit_bias: {key!r} is not a token id.", "logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or bias != bias:
            raise RequestError(f"logit_bias: {bias!r}, given for token {key}, is not a number.", "logit_bias")
        result[int(text)] = float(min(100, max(-100, bias)))
    return result


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, got {value!r}.", name)


def _number(name: str, value: Any, low: float, high: float, *, low_open: bool = False) -> None:
    # The largest float bounds integers too, which may be too large to become one.
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not ok or value > high or value < low or (low_open and value == low):
        if high == math.inf:
            limit = f"{'above' if low_open else 'of at least'} {low:g}"
        else:
            limit = f"in {'(' if low_open else '['}{low:g}, {high:g}]"
        raise RequestError(f"{name} must be a finite number {limit}, got {_short(value)}.", name)


def _integer(name: str, value: Any, low: int, high: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        limit = f"between {low} and {high}" if high is not None else f"of at least {low}"
        raise RequestError(f"{name} must be an integer {limit}, got {_short(value)}.", name)


def _short(value: Any) -> str:
    """What was sent, for a message, but not thousands of digits of it."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a very large integer"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
