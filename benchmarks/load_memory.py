"""Memory while a model loads: python benchmarks/load_memory.py

For each number format a fresh process loads the model and watches its own anonymous memory, that is what is not a
mapped file (RssAnon in /proc/self/status). Printed: what the finished model takes, the most it took on the way, their
ratio; both beyond what the process took before. Goal: at most 1.3 times the finished model. Linux only.
"""

from __future__ import annotations

import argparse
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from checkpoint import model_folder
from report import save, show, table

GOAL = 1.3
INTERVAL_S = 0.0005


@dataclass(frozen=True, slots=True)
class Loaded:
    """Bytes beyond those of the process before it loaded."""

    quantization: str
    finished: int
    peak: int

    @property
    def ratio(self) -> float:
        return self.peak / self.finished


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def load(model: str, dtype: str, quantization: str) -> Loaded:
    """In a process of its own: what other loads left behind would be reused."""
    from octavo.engine import LLM
    from octavo.engine.loader import assign

    seen = {"before": 0, "peak": 0, "after": 0}
    plain = assign.load_weights

    def watched(*args: object, **options: object) -> None:
        done = threading.Event()
        seen["before"] = anonymous_bytes()

        def watch() -> None:
            while not done.wait(INTERVAL_S):
                seen["peak"] = max(seen["peak"], anonymous_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            plain(*args, **options)  # type: ignore[arg-type]
        finally:
            done.set()
            watcher.join()
        seen["after"] = anonymous_bytes()

    import octavo.engine.runner.build as build

    build.load_weights = watched
    LLM(model, dtype=dtype, quantization=quantization, kv_cache_memory_bytes=1 << 26, max_model_len=512)
    return Loaded(quantization, seen["after"] - seen["before"], max(seen["peak"], seen["after"]) - seen["before"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="preset, folder, .gguf or hub id")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantization", nargs="+", default=["none", "int8", "int4", "fp8"])
    parser.add_argument("--output", type=Path, help="result file (default: build/benchmarks/)")
    args = parser.parse_args()
    folder = str(model_folder(args.model, "bfloat16"))
    found = []
    for quantization in args.quantization:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
            found.append(child.submit(load, folder, args.dtype, quantization).result())
    columns = table(("quantization", "finished MB", "peak MB", "ratio", "goal"))
    for loaded in found:
        met = "met" if loaded.ratio <= GOAL else "missed"
        columns.add_row(
            loaded.quantization,
            f"{loaded.finished / 1e6:.0f}",
            f"{loaded.peak / 1e6:.0f}",
            f"{loaded.ratio:.2f}",
            f"≤ {GOAL}: {met}",
        )
    show("memory while loading", columns)
    save("load_memory", vars(args), [asdict(loaded) for loaded in found], args.output)


if __name__ == "__main__":
    main()
