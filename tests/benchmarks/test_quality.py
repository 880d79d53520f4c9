"""The quality benchmark's figures, by hand; its table; bytes of weights."""

import argparse
import math
from types import SimpleNamespace

import pytest
import torch
from drive import weight_bytes
from quality import DATA, FORMATS, Quality, goal_ratio, own_logprobs, perplexity, questions, show_results, windows

from octavo.engine.types import Logprob


def test_windows_hold_every_token_once():
    assert windows(range(7), 3) == [[0, 1, 2], [3, 4, 5]], "a single token has nothing to score"
    assert windows(range(8), 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert windows([], 3) == []


def test_perplexity_of_a_fair_die_is_six():
    prompt = [3, 1, 5]
    entries = [None, {1: Logprob(math.log(1 / 6)), 2: Logprob(-0.1)}, {5: Logprob(math.log(1 / 6))}]
    assert perplexity(own_logprobs(prompt, entries)) == pytest.approx(6)


def test_the_text_and_the_questions():
    assert len((DATA / "alice.txt").read_text().split()) > 2000
    assert len(set(questions())) == 50


def test_every_reference_is_a_format_that_is_its_own():
    for made in FORMATS.values():
        assert FORMATS[made.against].against == made.against


def test_the_table(capsys):
    results = {
        "float32": Quality(100, 20.0, 9, ((1,) * 32, (2,) * 32)),
        "int8": Quality(None, 20.1, 9, ((1,) * 32, (2,) * 16 + (3,) * 16)),
        "gguf": Quality(50, 22.0, 9, ((1,) * 32, (2,) * 32)),
    }
    args = argparse.Namespace(model="m", window=512, answer_len=32)
    show_results(results, args)
    words = capsys.readouterr().out
    for word in ("1.0050", "50%", "24.0", "within 1%", "met"):
        assert word in words
    assert goal_ratio(results) == pytest.approx(1.005)
    assert goal_ratio({"int8": results["int8"]}) is None


def test_weight_bytes_count_what_is_shared_once():
    head, table, norm = torch.nn.Module(), torch.nn.Module(), torch.nn.LayerNorm(4)
    head.packed = table.packed = SimpleNamespace(nbytes=1000)
    runner = SimpleNamespace(model=torch.nn.ModuleList([head, table, norm, norm]))
    engine = SimpleNamespace(core=SimpleNamespace(process=SimpleNamespace(_runner=runner)))
    assert weight_bytes(engine) == 1000 + 2 * 4 * 4
    assert weight_bytes(SimpleNamespace(core=SimpleNamespace(process=object()))) is None
