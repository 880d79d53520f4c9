"""TextStream: the text of one sequence as its tokens arrive, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo.engine.params import SamplingParams
from octavo.engine.text.detokenizer import make_detokenizer
from octavo.engine.text.stops import StopFinder
from octavo.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextDelta:
    """text: what may be shown now. stop: the stop string that ended the text, on the push that found it.

    num_tokens_used: how many of the pushed tokens count, from the first; fewer than were pushed only once a stop string
    is found. The token that completes the stop string counts.
    """

    text: str
    stop: str | None
    num_tokens_used: int


class TextStream:
    """Detokenizes one sequence and watches for `params.stop`. The owner aborts the sequence when a stop is found.

    shown_tokens: special tokens whose text is given out though special tokens are skipped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        shown_tokens: frozenset[int] = frozenset(),
    ) -> None:
        self._params = params
        self._num_tokens = 0
        self._ended = False
        self._stops = StopFinder(params.stop, params.include_stop_str_in_output)
        self._detokenizer = (
            make_detokenizer(
                tokenizer,
                prompt_token_ids,
                params.skip_special_tokens,
                params.spaces_between_special_tokens,
                shown_tokens,
            )
            if params.detokenize
            else None
        )

    def push(self, token_ids: Sequence[int], finished: bool = False, stop_token: bool = False) -> TextDelta:
        """The sequence's next tokens; `finished` if they are its last ones.

        stop_token: the last of them is the end token or a stop token that ended the sequence. Its text is left out,
        as in vLLM, unless include_stop_str_in_output. Once a stop string was found or the sequence has finished,
        tokens are ignored.
        """
        if self._ended:
            return TextDelta("", None, 0)
        self._ended = finished
        if self._detokenizer is None:
            return TextDelta("", None, len(token_ids))
        silent = stop_token and not self._params.include_stop_str_in_output
        shown = token_ids[:-1] if silent else token_ids
        if self._params.stop:
            return self._push_watching(shown, len(token_ids), finished)
        text = self._detokenizer.push(shown)
        return TextDelta(text + self._detokenizer.finish() if finished else text, None, len(token_ids))

    def _push_watching(self, token_ids: Sequence[int], num_pushed: int, finished: bool) -> TextDelta:
        """Token by token, to tell which one completes a stop string."""
        assert self._detokenizer is not None
        out: list[str] = []
        for number, token_id in enumerate(token_ids, 1):
            self._num_tokens += 1
            text, stop = self._stops.push(self._detokenizer.push((token_id,)), self._armed)
            out.append(text)
            if stop is not None:
                self._ended = True
                return TextDelta("".join(out), stop, number)
        if finished:
            text, stop = self._stops.push(self._detokenizer.finish(), self._armed)
            out.append(text)
            if stop is None:
                out.append(self._stops.flush())
            return TextDelta("".join(out), stop, num_pushed)
        return TextDelta("".join(out), None, num_pushed)

    @property
    def _armed(self) -> bool:
        """Stop strings count from the first token after `min_tokens` on, as in vLLM."""
        return self._num_tokens > self._params.min_tokens
