"""The benchmarks are scripts that import each other by file name, as Python does when one is run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
