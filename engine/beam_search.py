"""Beam search as users of the library know it: vLLM's BeamSearchParams in, its BeamSearchOutput out.

Knows vLLM's names. What the search is: octavo.engine.beam.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from octavo.engine.beam import Beams
from octavo.engine.params import SamplingParams
from octavo.engine.text.tokenizer import Tokenizer
from octavo.engine.types import CompletionOutput, FinishReason, Logprob, RequestOutput


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """vLLM's fields, and early_stopping and stop_token_ids as transformers has them (see octavo.engine.beam.Beams).

    temperature has no effect: beams are compared by the model's own log probabilities.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    early_stopping: bool | Literal["never"] = False
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0

    def sampling_params(self) -> SamplingParams:
        """Raises RequestError, naming the field, for a value out of range."""
        beams = Beams(self.beam_width, self.length_penalty, self.early_stopping)
        return SamplingParams(
            n=self.beam_width,
            beams=beams,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids),
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=0,
        )


@dataclass(slots=True)
class BeamSearchSequence:
    """One beam. `tokens` and `text` begin with the prompt, as in vLLM; a token that ended the beam is left out unless
    include_stop_str_in_output. logprobs: of every generated token, the one that ended the beam included."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float
    text: str
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The beams of one prompt, the best first."""

    sequences: list[BeamSearchSequence]


def beams_of(output: RequestOutput, params: BeamSearchParams, tokenizer: Tokenizer) -> BeamSearchOutput:
    """What a finished request of `params.sampling_params()` has found."""
    return BeamSearchOutput([_sequence(output, beam, params, tokenizer) for beam in output.outputs])


def _sequence(
    output: RequestOutput, beam: CompletionOutput, params: BeamSearchParams, tokenizer: Tokenizer
) -> BeamSearchSequence:
    shown = beam.token_ids
    if beam.finish_reason == "stop" and not params.include_stop_str_in_output:
        shown = shown[:-1]
    tokens = [*output.prompt_token_ids, *shown]
    return BeamSearchSequence(
        tokens=tokens,
        logprobs=beam.logprobs or [],
        cum_logprob=beam.cumulative_logprob or 0.0,
        text=tokenizer.decode(tokens, skip_special_tokens=params.skip_special_tokens),
        finish_reason=beam.finish_reason,
        stop_reason=beam.stop_reason,
    )
