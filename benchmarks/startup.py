"""Start-up: from `octavo serve MODEL` to the first streamed token, and a clean end.

    python benchmarks/startup.py

Starts the server as a process, several times; prints the median times, the server's own table of phases, and whether
SIGTERM ended it with exit code 0 and without orphans. The first run may find files in no cache, so it has its own line.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import httpx
from report import RESULTS, console, save, show, table
from server import Server, ServerError

GOAL_S = 20.0


@dataclass(frozen=True, slots=True)
class Startup:
    """One start and end. Seconds since the process was started; `stop_s` since SIGTERM."""

    ready_s: float
    first_token_s: float
    stop_s: float
    exit_code: int | None
    orphans: tuple[str, ...]


def first_token(url: str, prompt: str, timeout_s: float) -> float:
    """The moment (time.perf_counter) at which the first token of a streamed completion is here."""
    body = {"prompt": prompt, "max_tokens": 4, "stream": True, "temperature": 0, "ignore_eos": True}
    with (
        httpx.Client(timeout=timeout_s) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as response,
    ):
        if response.status_code != 200:
            raise ServerError(f"/v1/completions answered {response.status_code}: {response.read().decode()[:300]}")
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if data != line and data != "[DONE]" and json.loads(data).get("choices"):
                return time.perf_counter()
    raise ServerError("the stream ended without a token.")


def start_and_stop(model: str, options: Sequence[str], timeout_s: float, log: Path) -> Startup:
    server = Server(model, options, log)
    try:
        server.wait_until_ready(timeout_s)
        ready = time.perf_counter()
        token = first_token(server.url, "Once upon a time", timeout_s)
    finally:
        stopping = time.perf_counter()
        code, orphans = server.stop()
    stopped = time.perf_counter()
    return Startup(ready - server.began, token - server.began, stopped - stopping, code, tuple(orphans))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time from `octavo serve` to the first token, and a clean end.")
    parser.add_argument("--model", default="smollm2-135m", help="preset, folder, .gguf, hub id, or fake")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=180, help="seconds a start may take")
    parser.add_argument("--serve-options", type=shlex.split, default=[], metavar="='--FLAG …'", help="for octavo serve")
    parser.add_argument("--output", type=Path, help="result file (default: build/benchmarks/)")
    args = parser.parse_args()
    log = RESULTS / "logs" / "startup.log"
    results: list[Startup] = []
    found = table(("run", "ready", "first token", "SIGTERM to exit", "exit code", "orphans"), left=0)
    for run in range(args.runs):
        try:
            with console.status(f"run {run + 1} of {args.runs}"):
                result = start_and_stop(args.model, args.serve_options, args.timeout, log)
        except ServerError as error:
            raise SystemExit(f"error: {error}") from error
        results.append(result)
        times = (f"{seconds:.1f} s" for seconds in (result.ready_s, result.first_token_s, result.stop_s))
        found.add_row(str(run + 1), *times, str(result.exit_code), str(len(result.orphans)))
    console.print(log.read_text(errors="replace")[:4000], markup=False, style="dim")
    show(f"octavo serve {args.model}", found)
    middle = median(result.first_token_s for result in results)
    console.print(f"first token after {middle:.1f} s (median of {args.runs}; goal: at most {GOAL_S:.0f} s)")
    unclean = [result for result in results if result.exit_code != 0 or result.orphans]
    for orphan in {orphan for result in results for orphan in result.orphans}:
        console.print(f"[red]orphan: {orphan}[/red]")
    save("startup", vars(args), {"median_first_token_s": middle, "runs": [asdict(r) for r in results]}, args.output)
    if unclean:
        sys.exit(1)


if __name__ == "__main__":
    main()
