"""Serving: latency and throughput of an OpenAI-compatible server under load.

    python benchmarks/serving.py --serve smollm2-135m --request-rate 1 2 4 --goodput ttft:500 tpot:100
    python benchmarks/serving.py --url http://127.0.0.1:8000 --max-concurrency 16
    python benchmarks/serving.py --compare-offline smollm2-135m

Requests arrive as a Poisson process at each --request-rate (inf: all at once), at most --max-concurrency at a time.
Prompts are random token ids of exact length, so no prefix cache can help. Result files use the field names of
`vllm bench serve`. Failed requests are counted apart and enter no latency.

--compare-offline runs the same prompts through the server and through the engine in this process, in turn, round by
round, at --max-concurrency (16 by default), and prints HTTP throughput ÷ offline throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from load import Job, Target, arrival_times_s, most_at_once, run_load
from metrics import Slo, Summary, Timing, summarize, throughput, vllm_fields
from prompts import random_prompts
from report import RESULTS, console, save, show, table
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from server import Server, ServerError

from octavo.engine.errors import ConfigError

GOAL_RATIO = 0.85


def slo_of(promises: Sequence[str]) -> Slo | None:
    """["ttft:500", "tpot:100"] (milliseconds, vllm's form) → Slo. Raises SystemExit for anything else."""
    if not promises:
        return None
    limits: dict[str, float] = {}
    for promise in promises:
        name, _, value = promise.partition(":")
        field = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s"}.get(name)
        try:
            limits[str(field)] = float(value) / 1000
        except ValueError:
            field = None
        if field is None:
            raise SystemExit(f"error: --goodput wants ttft:MS, tpot:MS or e2el:MS, got {promise!r}.")
    return Slo(**limits)


def jobs_of(args: argparse.Namespace, key: object) -> list[Job]:
    """Each request's lengths are drawn from those given."""
    draw = random.Random(repr(key))
    jobs = []
    for number in range(args.num_prompts):
        [prompt] = random_prompts(1, draw.choice(args.input_len), args.vocab_size, (key, number))
        jobs.append(Job(tuple(prompt), draw.choice(args.output_len)))
    return jobs


def load(
    target: Target, jobs: Sequence[Job], rate: float, concurrency: int | None, seed: int
) -> tuple[list[Timing], float]:
    """Run one load, with a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{rate:g} requests/s", total=len(jobs))
        arrivals = arrival_times_s(len(jobs), rate, seed)
        return asyncio.run(run_load(target, jobs, arrivals, concurrency, on_end=lambda timing: progress.advance(task)))


def show_summaries(summaries: dict[float, Summary], args: argparse.Namespace) -> None:
    found = table(
        (
            "requests/s offered",
            "done",
            "failed",
            "requests/s",
            "tokens/s out",
            "goodput",
            "latency",
            "p50",
            "p95",
            "p99",
        ),
        left=0,
    )
    for rate, s in summaries.items():
        head = [f"{rate:g}", str(s.completed), str(s.failed), f"{s.request_throughput_rps:.2f}"]
        head += [f"{s.output_throughput_tps:,.1f}"]
        head += ["–" if s.request_goodput_rps is None else f"{s.request_goodput_rps:.2f}"]
        spreads = {"TTFT": s.ttft_s, "TPOT": s.tpot_s, "ITL": s.itl_s, "e2e": s.e2e_s}
        for name, values in spreads.items():
            times = (f"{1000 * value:,.1f} ms" for value in (values.p50, values.p95, values.p99))
            found.add_row(*(head if name == "TTFT" else [""] * len(head)), name, *times, end_section=name == "e2e")
    at_most = f", at most {args.max_concurrency} at once" if args.max_concurrency else ""
    show(f"{args.num_prompts} requests, {args.input_len} tokens in, {args.output_len} out{at_most}", found)


def show_errors(timings: Sequence[Timing]) -> None:
    for error, count in Counter(timing.error for timing in timings if timing.failed).most_common(5):
        console.print(f"[red]{count} failed: {error}[/red]", highlight=False)


def fields_of(summary: Summary, timings: Sequence[Timing], rate: float) -> dict[str, Any]:
    return {
        "request_rate": "inf" if rate == float("inf") else rate,
        **vllm_fields(summary),
        "max_concurrent_requests": most_at_once(timings),
        "errors": dict(Counter(timing.error for timing in timings if timing.error)),
    }


def run_rates(target: Target, args: argparse.Namespace) -> list[dict[str, Any]]:
    slo = slo_of(args.goodput)
    summaries: dict[float, Summary] = {}
    results = []
    for rate in args.request_rate:
        timings, duration_s = load(target, jobs_of(args, (args.seed, rate)), rate, args.max_concurrency, args.seed)
        show_errors(timings)
        summaries[rate] = summarize(timings, duration_s, slo)
        results.append(fields_of(summaries[rate], timings, rate))
    show_summaries(summaries, args)
    return results


def compare_offline(target: Target, args: argparse.Namespace) -> dict[str, Any]:
    """HTTP and offline in turn, the same prompts in each round."""
    from drive import Bench
    from options import engine_options

    from octavo.engine.config import EngineConfig

    concurrency = args.max_concurrency or 16
    if len(args.input_len) > 1 or len(args.output_len) > 1:
        raise SystemExit("error: --compare-offline wants one --input-len and one --output-len.")
    settings = {"max_num_seqs": concurrency, "enable_prefix_caching": False, **engine_options(args.options)}
    bench = Bench(EngineConfig(model=args.compare_offline, **settings))
    http, offline = [], []
    try:
        for round_ in range(-1, args.rounds):  # the first is the offline engine's warm-up
            jobs = jobs_of(args, (args.seed, round_))[: concurrency if round_ < 0 else None]
            with console.status(f"offline, round {round_ + 1} of {args.rounds}"):
                run = bench.run([job.prompt for job in jobs], args.output_len[0])
            timings, duration_s = load(target, jobs, float("inf"), concurrency, args.seed)
            show_errors(timings)
            summary = summarize(timings, duration_s)
            if summary.failed:
                raise SystemExit(f"error: {summary.failed} requests failed; a ratio would mean nothing.")
            if round_ >= 0:
                http.append(summary.output_throughput_tps)
                offline.append(throughput(len(jobs) * args.output_len[0], run.wall_s))
    finally:
        bench.close()
    ratio = median(a / b for a, b in zip(http, offline, strict=True))
    found = table(("", "generated tokens/s"))
    found.add_row("over HTTP", f"{median(http):,.1f}")
    found.add_row("offline", f"{median(offline):,.1f}")
    found.add_row("HTTP ÷ offline", f"{ratio:.2f}")
    show(f"{concurrency} streams at once, median of {args.rounds} rounds (goal: at least {GOAL_RATIO})", found)
    return {"concurrency": concurrency, "http_tps": http, "offline_tps": offline, "ratio": ratio}


@contextlib.contextmanager
def target_of(args: argparse.Namespace) -> Iterator[Target]:
    """The server that is there, or one that is started and ended here."""
    if args.url:
        yield connect(args.url.rstrip("/").removesuffix("/v1"), args)
        return
    model = args.serve or args.compare_offline
    server = Server(model, args.serve_options, RESULTS / "logs" / "serving.log")
    try:
        with console.status(f"starting octavo serve {model}"):
            server.wait_until_ready(args.start_timeout)
        yield connect(server.url, args)
    finally:
        code, orphans = server.stop()
        if code != 0 or orphans:
            console.print(f"[red]the server ended with exit code {code} and left {orphans}[/red]")


def connect(url: str, args: argparse.Namespace) -> Target:
    """Ask the server for its model if none is named. Raises SystemExit if nobody answers."""
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    model = args.model
    if model is None:
        try:
            response = httpx.get(f"{url}/v1/models", headers=headers, timeout=30).raise_for_status()
            model = response.json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise SystemExit(f"error: {url}/v1/models does not answer: {error}") from error
    target = Target(url, model, args.api_key, args.request_timeout)
    warm_up = [Job(tuple(ids), 4) for ids in random_prompts(4, args.input_len[0], args.vocab_size, "warm-up")]
    timings, _ = asyncio.run(run_load(target, warm_up, [0.0] * len(warm_up)))
    failed = next((timing for timing in timings if timing.failed), None)
    if failed is not None:
        raise SystemExit(f"error: {url} cannot serve the benchmark's requests: {failed.error}")
    return target


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Latency and throughput of an OpenAI-compatible server under load.")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help="a server that is running")
    where.add_argument("--serve", metavar="MODEL", help="start `octavo serve MODEL` and end it afterwards")
    parser.add_argument("--serve-options", type=shlex.split, default=[], metavar="='--FLAG …'", help="for octavo serve")
    parser.add_argument("--compare-offline", metavar="MODEL", help="HTTP ÷ offline throughput of this model")
    parser.add_argument("--rounds", type=int, default=3, help="of --compare-offline")
    parser.add_argument("--options", nargs="*", default=[], metavar="FIELD=VALUE", help="EngineConfig fields, offline")
    parser.add_argument("--request-rate", type=float, nargs="+", default=[float("inf")], help="requests/s, or inf")
    parser.add_argument("--max-concurrency", type=int, help="requests at once (--compare-offline: 16)")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--input-len", type=int, nargs="+", default=[128], help="each request draws one of these")
    parser.add_argument("--output-len", type=int, nargs="+", default=[64])
    parser.add_argument("--vocab-size", type=int, default=30000, help="prompts use token ids below this")
    parser.add_argument("--goodput", nargs="+", default=[], metavar="METRIC:MS", help="SLO, as in ttft:500 tpot:100")
    parser.add_argument("--model", help="name the server knows it by (default: the first of /v1/models)")
    parser.add_argument("--api-key", default=os.environ.get("OCTAVO_API_KEY"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--request-timeout", type=float, default=300, help="seconds one request may take")
    parser.add_argument("--start-timeout", type=float, default=180, help="seconds the server may take to start")
    parser.add_argument("--output", type=Path, help="result file (default: build/benchmarks/)")
    args = parser.parse_args()
    if not (args.url or args.serve or args.compare_offline):
        parser.error("say which server: --url URL, --serve MODEL or --compare-offline MODEL.")
    if min(args.request_rate) <= 0:
        parser.error("--request-rate must be above 0.")
    return args


def main() -> None:
    args = parse()
    settings = {key: value for key, value in vars(args).items() if key != "api_key"}
    settings["request_rate"] = [str(rate) for rate in args.request_rate]
    try:
        with target_of(args) as target:
            if args.compare_offline:
                result = compare_offline(target, args)
                save("serving-vs-offline", settings, result, args.output)
            else:
                results = run_rates(target, args)
                save("serving", settings, results, args.output)
                if all(result["completed"] == 0 for result in results):
                    sys.exit(1)
    except (ServerError, ConfigError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
