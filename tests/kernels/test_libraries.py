"""The native libraries are there where they can be: pip goes on without one whose compilation failed."""

import platform
import shutil
from pathlib import Path

import pytest

from octavo.kernels import cpu
from octavo.kernels.cpu.library import ISAS, cpu_flags, runnable


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or not (shutil.which("c++") or shutil.which("g++")),
    reason="no C++ compiler for x86-64",
)
def test_every_instruction_set_was_compiled():
    folder = Path(cpu.__file__).parent
    assert [isa for isa in ISAS if not list(folder.glob(f"_{isa}.*.so"))] == []
    assert set(runnable()) == {isa for isa, needs in ISAS.items() if needs <= cpu_flags()}
    for isa in runnable():
        assert cpu.load(isa) is not None
