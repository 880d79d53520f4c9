"""Every kernel compiles for an H100; no GPU is needed for that. In a process of its own, which does not interpret."""

import re
import subprocess
import sys
from pathlib import Path

from octavo.kernels import triton

LAUNCH = re.compile(r"^\s+(_\w+)\[", re.MULTILINE)


def test_every_kernel_that_is_launched_compiles() -> None:
    script = Path(__file__).with_name("compile_all.py")
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert triton.__file__ is not None
    launched = {name for file in Path(triton.__file__).parent.glob("*.py") for name in LAUNCH.findall(file.read_text())}
    assert launched == {line.split()[1] for line in ran.stdout.splitlines() if line.startswith("compiled")}
