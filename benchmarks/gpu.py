"""What octavo reaches on this GPU, in under eight minutes: make bench-gpu, or python3 benchmarks/gpu.py

Correctness first: kernels against `ref`, small models against transformers. Then every goal of the GPU path beside what
this very device was measured to do: kernels, whole models with dummy weights, transformers' generate. One table is
printed; benchmarks/results/<gpu>-<date>.json keeps it, with a profile for each goal that was missed.

Each section is a process of its own with a time limit, so that one that hangs or breaks the device's context takes
nothing but itself along; what it had found until then counts. Sections that no time was left for are named.

Ends with 1 where a result was wrong or a section failed; a missed goal is no failure.

--tiny runs all of it on shapes that mean nothing, in this process: on a GPU if there is one, else in Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if shutil.which("nvidia-smi") is None:  # read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from gpu_rows import Bench, Row, read_lines
from report import console, hardware, save, show, table
from rich.table import Table

HERE = Path(__file__).resolve().parent
BUDGET_S = 465.0  # for all sections; the rest of eight minutes is for starting and printing
LEAST_S = 10.0  # what a section is started with
LOG_LINES = 4  # of a section that failed, shown


@dataclass(frozen=True, slots=True)
class Section:
    """run: `module.function`, which takes a Bench. budget_s: after which it is stopped. quick: part of --quick."""

    name: str
    run: str
    budget_s: float
    quick: bool = True

    def __call__(self, bench: Bench) -> None:
        module, _, function = self.run.partition(".")
        getattr(importlib.import_module(module), function)(bench)


# In the order of importance: where time runs out, the last are left out.
SECTIONS = (
    Section("device", "gpu_kernels.device", 30),
    Section("ops", "gpu_kernels.other_ops", 30),
    Section("parity", "gpu_parity.parity", 90),
    Section("attention", "gpu_kernels.attention", 75),
    Section("rows", "gpu_kernels.row_ops", 30),
    Section("bf16", "gpu_engine.bf16", 90),
    Section("fp8", "gpu_engine.fp8", 60),
    Section("w4a16", "gpu_engine.w4a16", 60),
    Section("transformers", "gpu_engine.transformers", 50, quick=False),
    Section("matmul", "gpu_kernels.matmuls", 60, quick=False),
    Section("sampling", "gpu_kernels.sampling", 30, quick=False),
    Section("loading", "gpu_engine.loading", 30, quick=False),
)


@dataclass(frozen=True, slots=True)
class Ran:
    """How a section ended. state: done, failed, stopped (at its limit) or skipped (no time was left)."""

    name: str
    state: str
    seconds: float
    note: str = ""


Runner = Callable[[Section, Bench, float], Ran]  # with the seconds it may take


def run_all(sections: Sequence[Section], bench: Bench, runner: Runner, budget_s: float) -> list[Ran]:
    """Rows and figures are the bench's afterwards."""
    found: list[Ran] = []
    end = time.monotonic() + budget_s
    for section in sections:
        left = end - time.monotonic()
        if left < LEAST_S:
            found.append(Ran(section.name, "skipped", 0.0, "no time was left"))
            continue
        console.print(f"[dim]{section.name} …[/dim]")
        found.append(runner(section, bench, min(section.budget_s, left)))
        if found[-1].state != "done":
            console.print(f"{section.name}: {found[-1].state}. {found[-1].note}", markup=False)
    return found


def here(section: Section, bench: Bench, budget_s: float) -> Ran:
    """In this process, without a limit."""
    begin = time.perf_counter()
    try:
        section(bench)
    except Exception as error:
        traceback.print_exc()
        return Ran(section.name, "failed", time.perf_counter() - begin, f"{type(error).__name__}: {error}")
    return Ran(section.name, "done", time.perf_counter() - begin)


def apart(section: Section, bench: Bench, budget_s: float) -> Ran:
    """In a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder) / "lines", Path(folder) / "log"
        command = [sys.executable, str(HERE / "gpu.py"), "--section", section.name, "--lines", str(lines)]
        command += ["--known", json.dumps(bench.known)]
        ran = limited(section.name, command, log, budget_s)
        rows, figures = read_lines(lines)
    bench.rows += rows
    bench.known |= figures
    return ran


def limited(name: str, command: Sequence[str], log: Path, budget_s: float) -> Ran:
    """Run a command, and end it with all it has started when the time is over."""
    begin = time.perf_counter()
    with log.open("w") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        state = "done"
        try:
            if child.wait(timeout=budget_s) != 0:
                state = "failed"
        except subprocess.TimeoutExpired:
            state = "stopped"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    seconds = time.perf_counter() - begin
    if state == "done":
        return Ran(name, state, seconds)
    last = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-LOG_LINES:]
    return Ran(name, state, seconds, f"after {seconds:.0f} s; status {child.returncode}; " + " | ".join(last))


def lines_of(rows: Sequence[Row], judged: bool = True) -> Table:
    """The table. judged: say whether goals are met."""
    made = table(("what", "shape", "measured", "floor", "share", "goal", "", "note"), left=2)
    made.columns[-1].justify = "left"
    for row in rows:
        verdict = {True: "[green]met[/green]", False: "[red]MISSED[/red]", None: ""}[row.met]
        made.add_row(
            row.what,
            row.shape,
            "" if row.measured is None else f"{number(row.measured)} {row.unit}",
            "" if row.floor is None else f"{number(row.floor)} {row.floor_of}",
            "" if row.share is None else f"{row.share:.2f}",
            "" if row.goal is None else f"{'≤' if row.at_most else '≥'} {row.goal:g}",
            "[bold red]WRONG[/bold red]" if row.wrong else verdict if judged else "",
            note_of(row).replace("[", "\\["),
        )
    return made


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def note_of(row: Row) -> str:
    if row.profile is None or not row.profile.kernels:
        return row.note
    kernel, share, _ = row.profile.kernels[0]
    idle = "" if row.profile.idle is None else f", idle {row.profile.idle:.0%}"
    return f"{row.note}; longest: {kernel[:40]} {share:.0%}{idle}".removeprefix("; ")


def gpu_name() -> str:
    """Asked without a CUDA context in this process, which would take memory from the sections."""
    return next(iter(hardware()["gpus"]), "cpu" if not torch.cuda.is_available() else "gpu")


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def result_path(gpu: str) -> Path:
    return HERE / "results" / f"{slug(gpu)}-{time.strftime('%Y-%m-%d')}.json"


def failed(rows: Sequence[Row], ran: Sequence[Ran]) -> bool:
    return any(row.wrong for row in rows) or any(one.state == "failed" for one in ran)


def make_bench(tiny: bool, lines: Path | None = None, known: dict[str, float] | None = None) -> Bench:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Bench(device, tiny, known or {}, lines)


def quiet() -> None:
    """No bars of transformers in what is kept of a section."""
    from transformers.utils import logging as theirs

    logging.getLogger("transformers").setLevel(logging.ERROR)
    theirs.disable_progress_bar()


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(section.name for section in SECTIONS)
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help=f"of {names}; device runs in any case")
    parser.add_argument("--quick", action="store_true", help="the goals alone, without transformers")
    parser.add_argument("--tiny", action="store_true", help="shapes that mean nothing, to see that all of it runs")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, help="seconds for all sections (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="result file (default: benchmarks/results/<gpu>-<date>.json)")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--known", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = set(options.only) - {section.name for section in SECTIONS}
    if unknown:
        parser.error(f"there is no section {', '.join(sorted(unknown))}; there are {names}.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    if options.section:
        quiet()
        (section,) = (section for section in SECTIONS if section.name == options.section)
        section(make_bench(options.tiny, options.lines, options.known))
        return 0
    if not torch.cuda.is_available() and not options.tiny:
        console.print("There is no CUDA device here; --tiny shows that the benchmark runs.")
        return 2
    chosen = [
        section
        for section in SECTIONS
        if section.name == "device"
        or (section.name in options.only if options.only else section.quick or not options.quick)
    ]
    begin, gpu, bench = time.perf_counter(), gpu_name(), make_bench(options.tiny)
    if options.tiny:
        quiet()
    ran = run_all(chosen, bench, here if options.tiny else apart, options.budget)
    seconds = time.perf_counter() - begin
    title = f"{gpu}, {seconds:.0f} s" + (": tiny shapes, FIGURES MEAN NOTHING" if options.tiny else "")
    show(title, lines_of(bench.rows, judged=not options.tiny))
    unfinished = [one for one in ran if one.state != "done"]
    for one in unfinished:
        console.print(f"{one.name} {one.state}: {one.note}", markup=False)
    results = {
        "gpu": gpu,
        "tiny": options.tiny,
        "seconds": seconds,
        "cuda": torch.version.cuda,
        "rates": {name: bench.known.get(name) for name in ("copy", "read", "matmul")},
        "sections": [asdict(one) for one in ran],
        "rows": [row.document() for row in bench.rows],
    }
    shown = {name: value for name, value in vars(options).items() if name not in ("section", "lines", "known")}
    save("gpu", shown, results, options.output or (None if options.tiny else result_path(gpu)))
    return 1 if failed(bench.rows, ran) else 0


if __name__ == "__main__":
    sys.exit(main())
