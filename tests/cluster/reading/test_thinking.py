"""Thoughts: split from answers however the text is cut, and counted."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.cluster.ingress.reading.formats import CALL_FORMATS, THINKING
from octavo.cluster.ingress.reading.parts import Answer, CallBegun, PlainReader, Reasoning
from octavo.cluster.ingress.reading.tape import merge
from octavo.cluster.ingress.reading.thinking import Thinking, ThinkingReader, ThoughtCounter

cuts = st.lists(st.integers(0, 80), max_size=8)


def read(text, at=(), is_open=False, then=None, **options):
    reader = ThinkingReader(Thinking(), then or PlainReader(), is_open=is_open, **options)
    bounds = [0, *sorted(min(cut, len(text)) for cut in at), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    return merge([part for i, piece in enumerate(pieces) for part in reader.push(piece, i == len(pieces) - 1)])


@pytest.mark.parametrize(
    ("text", "is_open", "parts"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", False, [Reasoning("Hm."), Answer("Yes.")]),
        ("<think></think>Yes.", False, [Answer("Yes.")]),
        ("\nHm, a < b. \n</think>\n\nYes.", True, [Reasoning("Hm, a < b."), Answer("Yes.")]),
        ("<think>\nHm.</think>Yes.", True, [Reasoning("Hm."), Answer("Yes.")]),
        ("Yes. </think> is a mark.", False, [Answer("Yes. </think> is a mark.")]),
        ("\n Yes.", False, [Answer("\n Yes.")]),
        ("<think>never ends ", False, [Reasoning("never ends ")]),
        ("</think>\n", True, []),
        ("a</think>b</think>", True, [Reasoning("a"), Answer("b</think>")]),
    ],
)
def test_split(text, is_open, parts):
    assert read(text, is_open=is_open) == parts
    assert read(text, range(len(text)), is_open) == parts


@given(
    text=st.lists(st.sampled_from(["<think>", "</think>", "\n", " ", "a", "<", "think", ">", "é"]), max_size=12).map(
        "".join
    ),
    cuts=cuts,
    is_open=st.booleans(),
)
def test_cuts_do_not_matter(text, cuts, is_open):
    assert read(text, cuts, is_open) == read(text, (), is_open)


def test_calls_are_read_behind_the_thought_only():
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    reader = CALL_FORMATS["hermes"].reader({})
    first, *rest = read(f"I could {call}.</think>\n{call}", is_open=True, then=reader)
    assert first == Reasoning(f"I could {call}.")
    assert isinstance(rest[0], CallBegun)


def test_a_hidden_thought_is_gone():
    assert read("<think>Hm.</think>Yes.", shown=False) == [Answer("Yes.")]


def test_what_a_prompt_says_of_the_thought():
    qwen, r1 = THINKING["qwen3"], THINKING["deepseek_r1"]
    assert qwen.is_open_after("<|im_start|>assistant\n<think>\n")
    assert not qwen.is_open_after("<|im_start|>assistant\n")
    assert r1.is_open_after("<｜Assistant｜>")
    for thinking in (qwen, r1):
        assert thinking.is_over_after("assistant\n<think>\n\n</think>\n\n")
        assert not thinking.is_open_after("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("tokens", "is_open", "count"),
    [([1, 7, 8, 2, 9, 9], False, 2), ([7, 8, 2, 9, 1, 9], True, 2), ([9, 9], False, 0), ([7, 8], True, 2)],
)
def test_tokens_of_thoughts_are_counted(tokens, is_open, count):
    together, single = (ThoughtCounter(1, 2, is_open=is_open) for _ in range(2))
    together.push(tokens)
    for token in tokens:
        single.push([token])
    assert together.num_tokens == single.num_tokens == count
    without_marks = ThoughtCounter(None, None, is_open=True)
    without_marks.push(tokens)
    assert without_marks.num_tokens == 0
