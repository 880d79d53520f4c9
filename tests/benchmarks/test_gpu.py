"""The GPU benchmark without a GPU: its verdicts, its limits, what it writes, and that a wrong kernel does not pass."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import gpu_kernels
import gpu_models
import pytest
import torch
from gpu_profile import summary
from gpu_rows import Bench, Profile, Row, read_lines

from octavo.kernels import triton as ops

GOALS = {  # of the issue, that the sections' rows carry: what → how many rows of it, and their goals
    "paged_attention": (0.90, 0.85, 1.0),
    "add_rms_norm": (0.90,),
    "rotary": (0.90,),
    "silu_and_mul": (0.90,),
    "8B bf16 decode": (0.88, 0.80),
    "8B bf16 prefill": (0.75,),
    "host gap between steps": (0.03,),
    "FP8 8B decode": (1.6,),
    "W4A16 8B decode": (2.5,),
    "8B bf16, whole run": (10.0,),
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    """Of a whole run on tiny shapes, but for the sections of which there are tests of their own."""
    path = tmp_path_factory.mktemp("results") / "tiny.json"
    sections = ["device", "ops", "attention", "rows", "bf16", "fp8", "w4a16", "transformers"]
    return gpu.main(["--tiny", "--output", str(path), "--only", *sections]), json.loads(path.read_text())


def test_a_run_says_what_was_measured_on_what(result: tuple[int, dict[str, Any]]) -> None:
    status, document = result
    assert status == 0
    assert {"commit", "versions", "command", "hardware", "results"} <= set(document)
    assert {"torch", "triton", "transformers"} <= set(document["versions"])
    found = document["results"]
    assert found["tiny"] is True
    assert all(found["rates"][name] > 0 for name in ("copy", "read", "matmul"))
    assert {one["state"] for one in found["sections"]} == {"done"}
    fields = {"what", "shape", "measured", "unit", "floor", "share", "goal", "met", "note", "wrong", "profile"}
    assert all(fields <= set(row) for row in found["rows"])


def test_every_goal_has_its_row(result: tuple[int, dict[str, Any]]) -> None:
    rows = result[1]["results"]["rows"]
    for what, goals in GOALS.items():
        assert tuple(row["goal"] for row in rows if row["what"] == what and row["goal"] is not None) == goals
        assert all(row["met"] is not None for row in rows if row["what"] == what and row["goal"] is not None)


def test_a_missed_goal_has_its_profile(result: tuple[int, dict[str, Any]]) -> None:
    missed = [row for row in result[1]["results"]["rows"] if row["what"] == "rotary" and row["met"] is False]
    assert missed
    assert missed[0]["profile"]["kernels"]


def test_a_wrong_kernel_is_not_measured_and_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = ops.silu_and_mul
    monkeypatch.setattr(ops, "silu_and_mul", lambda x: right(x) * 1.05)
    path = tmp_path / "wrong.json"
    assert gpu.main(["--tiny", "--only", "rows", "--output", str(path)]) == 1
    rows = [row for row in json.loads(path.read_text())["results"]["rows"] if row["what"] == "silu_and_mul"]
    assert [(row["wrong"], row["measured"], row["goal"]) for row in rows] == [(True, None, None)]


def test_a_wrong_draw_is_found() -> None:
    bench = Bench(torch.device("cpu"), True, {"copy": 1e9, "read": 1e9, "matmul": 1e9})
    right = ops.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "draw", lambda *given: (right(*given) + 1) % gpu_kernels.TINY_VOCAB)
        gpu_kernels.sampling(bench)
    assert {row.what for row in bench.rows if row.wrong} == {"draw", "draw, top_k 50, top_p 0.9"}
    assert all(row.measured is not None for row in bench.rows if not row.wrong)


def test_verdicts() -> None:
    least = Row("x", share=0.9, goal=0.9)
    assert least.met is True
    assert replace(least, share=0.89).met is False
    assert replace(least, share=None).met is None
    assert replace(least, goal=None).met is None
    assert replace(least, wrong=True).met is False
    assert replace(least, share=0.02, goal=0.03, at_most=True).met is True
    assert replace(least, share=0.04, goal=0.03, at_most=True).met is False


def test_rows_come_through_a_file_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    bench = Bench(torch.device("cpu"), True, into=path)
    bench.row(Row("x", "y", 1.5, "GB/s", 2.0, "copy", 0.75, 0.9), lambda: Profile((("kernel", 0.5, 3),), 0.1))
    bench.figure("copy", 2e9)
    path.write_text(path.read_text() + '{"row": {"wha')  # stopped in the middle of a line
    assert read_lines(path) == (bench.rows, {"copy": 2e9})
    assert bench.rows[0].profile is not None


def test_a_profile_is_of_the_time_that_the_device_was_busy() -> None:
    found = summary([("a", 0, 4), ("b", 2, 6), ("a", 8, 10)])
    assert found.kernels == (("a", 0.6, 2), ("b", 0.4, 1))
    assert found.idle == pytest.approx(0.2)
    assert summary([]) == Profile((), None)


def test_a_section_that_hangs_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    begin = time.monotonic()
    ran = gpu.limited("slow", ["sh", "-c", "echo began; sleep 60 & sleep 60"], tmp_path / "log", 0.3)
    assert (ran.state, ran.note.rsplit(" | ")[-1].split("; ")[-1]) == ("stopped", "began")
    assert time.monotonic() - begin < 10


def test_a_section_that_breaks_is_a_failure(tmp_path: Path) -> None:
    ran = gpu.limited("broken", [sys.executable, "-c", "raise SystemExit('no device')"], tmp_path / "log", 30)
    assert (ran.state, "no device" in ran.note) == ("failed", True)
    assert gpu.failed([], [ran])
    assert not gpu.failed([Row("x", share=0.1, goal=0.9)], [replace(ran, state="stopped")])


def test_a_section_apart_says_what_it_found(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    assert gpu.main(["--tiny", "--section", "device", "--lines", str(lines)]) == 0
    rows, figures = read_lines(lines)
    assert [row.what for row in rows] == ["device: copy", "device: read", "device: matmul"]
    assert set(figures) == {"copy", "read", "matmul"}


def test_sections_without_time_are_named() -> None:
    bench = Bench(torch.device("cpu"), True)
    ran = gpu.run_all(gpu.SECTIONS[:2], bench, gpu.here, gpu.LEAST_S / 2)
    assert [(one.name, one.state) for one in ran] == [("device", "skipped"), ("ops", "skipped")]


def test_all_sections_fit_into_eight_minutes_but_for_the_last() -> None:
    assert gpu.BUDGET_S < 480
    assert sum(section.budget_s for section in gpu.SECTIONS if section.quick) <= gpu.BUDGET_S


def test_sizes_are_those_of_the_published_models() -> None:
    """Llama-3.1-8B has 8.03e9 parameters, Qwen3-8B 8.19e9, their embeddings among them."""
    for config, whole in ((gpu_models.LLAMA, 8.03e9), (gpu_models.QWEN, 8.19e9)):
        shape = gpu_models.shape_of(config)
        assert shape.layer_parameters + 2 * shape.head_parameters == pytest.approx(whole, rel=2e-3)
    assert gpu_models.shape_of(gpu_models.LLAMA).kv_bytes_per_token == 131072
