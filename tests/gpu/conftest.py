"""Tests on a CUDA GPU. Those marked `gpu` need one; a small one of each kind also runs on a CPU, so that the others'
code is known to work.
"""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(Path(__file__).parent)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def device() -> torch.device:
    """A GPU; without one the CPU, on which Triton interprets."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
