"""TextStream: text, stop strings and token counts of one sequence; and bad words."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.engine.errors import RequestError
from octavo.engine.params import SamplingParams
from octavo.engine.text.bad_words import bad_words_token_ids
from octavo.engine.text.byte_tokenizer import ByteTokenizer
from octavo.engine.text.stream import TextDelta, TextStream
from octavo.engine.text.tokenizer import Tokenizer

BYTES = ByteTokenizer()


def ids(text: str) -> list[int]:
    return BYTES.encode(text, add_special_tokens=False)


def stream(**params: object) -> TextStream:
    return TextStream(BYTES, ids("prompt"), SamplingParams(max_tokens=None, **params))  # type: ignore[arg-type]


def test_text_without_stops_passes_through() -> None:
    s = stream()
    assert s.push(ids("ab"), False) == TextDelta("ab", None, 2)
    assert s.push(ids("é")[:1], False) == TextDelta("", None, 1)
    assert s.push(ids("é")[1:], True) == TextDelta("é", None, 1)
    assert s.push(ids("more"), False) == TextDelta("", None, 0)


def test_the_token_that_completes_the_stop_string_is_the_last_that_counts() -> None:
    s = stream(stop=("END",))
    assert s.push(ids("one E"), False) == TextDelta("one ", None, 5)
    assert s.push(ids("NDtail"), False) == TextDelta("", "END", 2)
    assert s.push(ids("x"), True) == TextDelta("", None, 0)
    assert stream(stop=("END",), include_stop_str_in_output=True).push(ids("a ENDtail")) == TextDelta("a END", "END", 5)


def test_held_text_comes_out_at_the_end() -> None:
    s = stream(stop=("END",))
    assert s.push(ids("an E"), False) == TextDelta("an ", None, 4)
    assert s.push([], True) == TextDelta("E", None, 0)


def test_a_stop_string_in_the_last_tokens_still_counts() -> None:
    assert stream(stop=("b",)).push(ids("abc"), True) == TextDelta("a", "b", 2)


def test_min_tokens_shields_from_stop_strings() -> None:
    s = stream(stop=("b",), min_tokens=3)
    assert s.push(ids("abb"), False) == TextDelta("abb", None, 3)
    assert s.push(ids("ab"), False) == TextDelta("a", "b", 2)
    s = stream(stop=("bcd",), min_tokens=3)  # begun in its shadow, complete outside
    assert s.push(ids("abc"), False) == TextDelta("a", None, 3)
    assert s.push(ids("d"), False) == TextDelta("", "bcd", 1)


def test_no_detokenizing_no_text() -> None:
    assert stream(detokenize=False).push(ids("abc"), True) == TextDelta("", None, 3)


def test_end_and_stop_tokens_are_not_shown() -> None:
    eos = 257
    assert stream().push([*ids("a"), eos], True) == TextDelta("a", None, 2)  # special, skipped
    assert stream(skip_special_tokens=False).push([*ids("a"), eos], True) == TextDelta("a<|eos|>", None, 2)
    assert stream(skip_special_tokens=False).push([*ids("a"), eos], True, stop_token=True) == TextDelta("a", None, 2)
    included = stream(skip_special_tokens=False, include_stop_str_in_output=True)
    assert included.push([*ids("a"), eos], True, stop_token=True) == TextDelta("a<|eos|>", None, 2)
    # A stop token that is text: shown only on demand.
    assert stream(stop=("zz",)).push(ids("a."), True, stop_token=True) == TextDelta("a", None, 2)
    assert stream(include_stop_str_in_output=True).push(ids("a."), True, stop_token=True) == TextDelta("a.", None, 2)


@given(
    text=st.text("ab é", max_size=30),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    stops=st.lists(st.text("ab é", min_size=1, max_size=3), max_size=2),
    include=st.booleans(),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "slow"])
def test_any_batching_of_tokens_gives_the_same(
    kinds: dict[str, Tokenizer], kind: str, text: str, sizes: list[int], stops: list[str], include: bool
) -> None:
    """Speculation and replayed tokens deliver several at once; nobody must be able to tell."""
    tokenizer = kinds[kind]
    tokens = tokenizer.encode(text, add_special_tokens=False)
    params = SamplingParams(max_tokens=None, stop=tuple(stops), include_stop_str_in_output=include)

    def run(steps: list[int]) -> tuple[str, str | None, int]:
        s, out, used, at, turn = TextStream(tokenizer, (), params), "", 0, 0, 0
        while at < len(tokens):
            step = tokens[at : at + steps[turn % len(steps)]]
            at, turn = at + len(step), turn + 1
            delta = s.push(step, at == len(tokens))
            out, used = out + delta.text, used + delta.num_tokens_used
            if delta.stop is not None:
                return out, delta.stop, used
        return out, None, used

    assert run(sizes) == run([1]) == run([len(tokens) + 1])


# ---- bad words


def test_bad_words_are_forbidden_with_and_without_a_space(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte-level"]
    tests = tokenizer.encode(" test", add_special_tokens=False)
    plain = tokenizer.encode("test", add_special_tokens=False)
    found = bad_words_token_ids(tokenizer, ["test", " test", "test"])
    assert tuple(plain) in found
    assert (tuple(tests) in found) == (len(tests) == len(plain) and tests[0] != plain[0])
    assert len(found) == len(set(found))


def test_bad_words_carry_no_special_tokens() -> None:
    assert bad_words_token_ids(BYTES, ["ab"]) == ((97, 98),)


def test_bad_words_of_one_token_are_found_in_both_spellings(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte-level"]
    word = next(t[1:] for t in tokenizer.convert_ids_to_tokens(range(260, 700)) if _one_token_twice(tokenizer, t))
    found = bad_words_token_ids(tokenizer, [word])
    assert [tokenizer.decode(sequence) for sequence in found] == [word, " " + word]


def test_a_bad_word_without_tokens_is_refused(kinds: dict[str, Tokenizer]) -> None:
    with pytest.raises(RequestError, match="has no tokens") as caught:
        bad_words_token_ids(kinds["wordpiece"], [" "])
    assert caught.value.param == "bad_words"


def _one_token_twice(tokenizer: Tokenizer, token: str) -> bool:
    """A word that is one token both at the beginning of a text and after a space."""
    spellings = (token[1:], " " + token[1:]) if token.startswith("Ġ") and len(token) > 1 else ()
    lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in spellings]
    return lengths == [1, 1]
