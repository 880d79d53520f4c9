"""The benchmarks that need no choice, one after the other: KV waste, offline, host time, prefix cache, quality of the
number formats, and peers where their venvs are.

    make bench            (or: python benchmarks/run.py --install)

What each prints is said in benchmarks/README.md; result files go to build/benchmarks/.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from report import console
from venvs import RECIPES, find_python

from octavo.engine.env import cache_dir

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description="The benchmarks that need no choice, in sequence.")
    parser.add_argument("--model", default="smollm2-135m", help="preset, folder, .gguf or hub id")
    parser.add_argument("--venvs", type=Path, default=cache_dir() / "venvs", help="folder of the peers' venvs")
    parser.add_argument("--install", action="store_true", help="make the peers' venvs (downloads ~1 GB)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model, rounds = ["--model", args.model], ["--rounds", str(args.rounds)]
    runs = [["kv_waste.py"], ["offline.py", *model, *rounds], ["host_time.py", *model, *rounds]]
    runs += [["prefix.py", *model], ["quality.py", *model]]
    if args.install or any(find_python(args.venvs, name) for name in RECIPES):
        install = ["--install"] if args.install else []
        runs.append(["peers.py", *model, *rounds, "--venvs", str(args.venvs), *install])
    else:
        console.print(f"no peers: {args.venvs} has no venv of any (--install makes them).")
    failed = [name for name, *options in runs if not _run(name, options)]
    if failed:
        raise SystemExit(f"error: {', '.join(failed)} failed.")


def _run(name: str, options: list[str]) -> bool:
    console.rule(" ".join([name, *options]))
    return subprocess.run([sys.executable, str(HERE / name), *options]).returncode == 0


if __name__ == "__main__":
    main()
