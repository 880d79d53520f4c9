"""The benchmark of quantized matmuls runs to its end without a GPU, on small shapes, and checks what it measures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_matmul.py"


def test_every_form_is_checked_and_measured(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPT), "--interpret", "--rows", "3", "--json", str(found)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-3000:]
    results = {one["what"]: one for one in json.loads(found.read_text())["results"]}
    assert set(results) == {
        "bf16, torch",
        "fp8 per output",
        "fp8 128×128",
        "int8 per output",
        "AWQ 128",
        "GPTQ 128",
        "4 experts, bf16",
    }
    weights = 192 * 256
    nbytes = results["int8 per output"]["gbytes"] * 1e9 * results["int8 per output"]["seconds"]
    assert nbytes == pytest.approx(weights + 192 * 4)
    assert results["AWQ 128"]["gbytes"] * 1e9 * results["AWQ 128"]["seconds"] < 0.6 * weights
