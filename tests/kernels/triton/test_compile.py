"""The interpreter runs what a GPU's compiler may refuse: attention over 8 bits is compiled for one that is not here.

The rest by hand, it takes a minute: python benchmarks/gpu_compile.py
"""

import os
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "gpu_compile.py"


def test_attention_compiles_for_hopper(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-W", "ignore", str(BENCHMARK), "--capability", "90", "--only", "float8_e4m3fn"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    kernels = [line.split() for line in ran.stdout.splitlines()[1:-1]]
    assert {"_write_kv", "_attend_parts", "_attend_tiles"} <= {words[0] for words in kernels}
    assert all(int(words[-2]) == 0 for words in kernels), f"registers are spilled:\n{ran.stdout}"
