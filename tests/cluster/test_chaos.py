"""A short run of the chaos benchmark: every request gets its right answer while processes are killed and stopped."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.live

CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.timeout(240)
def test_nobody_can_tell():
    options = ["--fake", "--minutes", "0.4", "--every", "1", "--concurrency", "4", "--questions", "8"]
    faults = ["--faults", "stop rank", "kill ingress", "kill replica", "kill node"]
    done = subprocess.run(
        [sys.executable, str(CHAOS), *options, *faults], capture_output=True, text=True, timeout=220, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "wrong 0, lost 0, hung 0, ended with an error 0" in done.stdout
