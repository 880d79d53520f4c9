"""Increments of text put together are what the tokenizer decodes in one go, for every kind and any token ids."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.engine.text.detokenizer import Detokenizer, make_detokenizer
from octavo.engine.text.tokenizer import Tokenizer

from .conftest import KINDS, TEXTS

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Few distinct ids, so that the interesting ones (special, added, bytes) meet often; some beyond any vocabulary.
IDS = st.lists(st.integers(0, 720) | st.integers(0, 5) | st.integers(120, 262), max_size=40)


def increments(detokenizer: Detokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    """Push `ids` in steps of the given sizes, in turn."""
    found, at, turn = [], 0, 0
    while at < len(ids):
        step = sizes[turn % len(sizes)]
        found.append(detokenizer.push(ids[at : at + step]))
        at, turn = at + step, turn + 1
    return [*found, detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@given(ids=IDS, sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), skip=st.booleans(), spaces=st.booleans())
@QUICK
def test_increments_make_up_the_decoded_text(
    kinds: dict[str, Tokenizer], kind: str, ids: list[int], sizes: list[int], skip: bool, spaces: bool
) -> None:
    tokenizer = kinds[kind]
    whole = tokenizer.decode(ids, skip, spaces)
    found = increments(make_detokenizer(tokenizer, (), skip, spaces), ids, sizes)
    assert "".join(found) == whole
    assert sum(text.count("�") for text in found) == whole.count("�")


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "metaspace"])
@given(ids=IDS)
@QUICK
def test_pieces_say_what_the_library_says(kinds: dict[str, Tokenizer], kind: str, ids: list[int]) -> None:
    pieces = kinds[kind].pieces
    assert pieces is not None
    expected = kinds[kind]._backend.decode(ids, skip_special_tokens=False)
    if kind == "byte-level" or "�" not in expected:  # its byte fallback is lossier than ours, on purpose
        assert pieces.decode(ids) == expected


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=IDS, ids=IDS, skip=st.booleans())
@QUICK
def test_text_after_a_prompt_is_what_the_prompt_lacks(
    kinds: dict[str, Tokenizer], kind: str, prompt: list[int], ids: list[int], skip: bool
) -> None:
    tokenizer = kinds[kind]
    before, both = tokenizer.decode(prompt, skip), tokenizer.decode([*prompt, *ids], skip)
    found = "".join(increments(make_detokenizer(tokenizer, prompt, skip), ids, [1]))
    if both.startswith(before):  # else the prompt ends inside a character
        assert before + found == both


@given(cut=st.integers(0, 40), text=st.text(max_size=20))
@QUICK
def test_valid_text_is_never_shown_with_half_a_character(kinds: dict[str, Tokenizer], cut: int, text: str) -> None:
    text = text.replace("�", "") + "€🎉é中"
    for kind in ("byte-level", "sentencepiece", "bytes", "slow"):
        tokenizer = kinds[kind]
        ids = tokenizer.encode(text, add_special_tokens=False)
        found = increments(make_detokenizer(tokenizer), ids, [1])
        assert not any("�" in piece for piece in found)
        # Cut anywhere, what is shown before the end is a beginning of the text.
        detokenizer = make_detokenizer(tokenizer)
        assert tokenizer.decode(ids).startswith("".join(detokenizer.push([i]) for i in ids[:cut]))


@pytest.mark.parametrize("kind", ["byte-level", "bytes", "sentencepiece"])
def test_a_character_that_the_prompt_began_is_whole(kinds: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = kinds[kind]
    ids = tokenizer.encode("x🦉", add_special_tokens=False)
    assert "".join(increments(make_detokenizer(tokenizer, ids[:-2]), ids[-2:], [1])) == "🦉"
    other = tokenizer.encode("x", add_special_tokens=False)[-1:]
    assert "".join(increments(make_detokenizer(tokenizer, ids[:-2]), other, [1])).strip() == "x"


def test_a_character_cut_off_by_the_end_shows_as_one_replacement(kinds: dict[str, Tokenizer]) -> None:
    for kind in ("byte-level", "bytes"):
        ids = kinds[kind].encode("a🦉", add_special_tokens=False)[:-1]
        detokenizer = make_detokenizer(kinds[kind])
        assert "".join(map(detokenizer.push, [[i] for i in ids])) == "a"
        assert detokenizer.finish() == "�"


def test_leading_space_of_sentencepiece_is_the_prompts_business(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["sentencepiece"]
    ids = tokenizer.encode("Hello", add_special_tokens=False)
    assert "".join(increments(make_detokenizer(tokenizer), ids, [1])) == "Hello"
    assert "".join(increments(make_detokenizer(tokenizer, [1]), ids, [1])) == "Hello"  # <s> is not shown
    assert "".join(increments(make_detokenizer(tokenizer, ids), ids, [1])) == " Hello"


@pytest.mark.parametrize("kind", ["byte-level", "wordpiece", "slow"])
def test_cost_per_token_does_not_grow(kinds: dict[str, Tokenizer], kind: str) -> None:
    """Counted in decoded tokens, and in bad bytes too, where nothing can be decided for long."""
    tokenizer = kinds[kind]

    def seconds(count: int) -> float:
        detokenizer = make_detokenizer(tokenizer, (), False)
        started = time.perf_counter()
        for number in range(count):
            detokenizer.push((200 + number % 50,))
        return time.perf_counter() - started

    seconds(50)
    short, long = min(seconds(200) for _ in range(3)), min(seconds(1600) for _ in range(3))
    assert long < 8 * short * 4  # linear is 8 ×; decoding everything anew would be 64 ×


def test_real_smollm2_streams_what_it_decodes(smollm2: Path) -> None:
    from octavo.engine.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(smollm2)

    @given(ids=st.lists(st.integers(0, 49151) | st.integers(17, 280), max_size=60), skip=st.booleans())
    @QUICK
    def check(ids: list[int], skip: bool) -> None:
        assert "".join(increments(make_detokenizer(tokenizer, (), skip), ids, [1, 2])) == tokenizer.decode(ids, skip)

    check()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert "".join(increments(make_detokenizer(tokenizer), ids, [1])) == text
