"""Every metric formula, once. Times are seconds on one monotonic clock; the unit is in the name.

Knows timings of single requests and what follows from them. Does not know how they were measured. A failed request has
an error and no latency: it is counted, and enters no formula below but `failed`.

TTFT: start of the request to its first token at the client. ITL: gap between two successive tokens, a distribution over
all gaps. TPOT: (last - first token time) ÷ (tokens - 1), one number per request. Goodput: requests per second that kept
the SLO.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, pstdev

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Timing:
    """What one request did. `token_times_s`: when each piece of the answer arrived, one entry per token where known."""

    start_s: float
    end_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    token_times_s: tuple[float, ...] = ()
    error: str | None = None

    @property
    def failed(self) -> bool:
        return self.error is not None


@dataclass(frozen=True, slots=True)
class Slo:
    """The latency promise to one request; None = not promised."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def kept(self, timing: Timing) -> bool:
        """Whether the request succeeded within the promise. What it has not (the TPOT of one token) cannot break it."""
        if timing.failed:
            return False
        pairs = ((self.ttft_s, ttft_s(timing)), (self.tpot_s, tpot_s(timing)), (self.e2e_s, e2e_s(timing)))
        return all(limit is None or value is None or value <= limit for limit, value in pairs)


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution in short; of an empty one everything is nan."""

    mean: float
    median: float
    std: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One run of many requests. Latencies are those of the completed ones."""

    duration_s: float
    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput_rps: float
    output_throughput_tps: float
    total_token_throughput_tps: float
    request_goodput_rps: float | None
    ttft_s: Spread
    tpot_s: Spread
    itl_s: Spread
    e2e_s: Spread


def ttft_s(timing: Timing) -> float | None:
    return timing.token_times_s[0] - timing.start_s if timing.token_times_s else None


def tpot_s(timing: Timing) -> float | None:
    """None below two tokens."""
    if timing.num_output_tokens < 2 or not timing.token_times_s:
        return None
    return (timing.token_times_s[-1] - timing.token_times_s[0]) / (timing.num_output_tokens - 1)


def itl_s(timing: Timing) -> list[float]:
    return [later - earlier for earlier, later in pairwise(timing.token_times_s)]


def e2e_s(timing: Timing) -> float:
    """Start of the request to its last token (to its end, if no token came)."""
    return (timing.token_times_s[-1] if timing.token_times_s else timing.end_s) - timing.start_s


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile, linear between neighbours (numpy's default); nan of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(values: Iterable[float | None]) -> Spread:
    """None is left out: a request that has no such value."""
    present = [value for value in values if value is not None]
    if not present:
        return Spread(*[math.nan] * 6)
    return Spread(
        fmean(present), median(present), pstdev(present), *(percentile(present, quantile) for quantile in PERCENTILES)
    )


def throughput(count: float, duration_s: float) -> float:
    """Per second; 0 if no time passed."""
    return count / duration_s if duration_s > 0 else 0.0


def goodput_rps(timings: Iterable[Timing], slo: Slo, duration_s: float) -> float:
    return throughput(sum(slo.kept(timing) for timing in timings), duration_s)


def summarize(timings: Sequence[Timing], duration_s: float, slo: Slo | None = None) -> Summary:
    done = [timing for timing in timings if not timing.failed]
    num_in = sum(timing.num_prompt_tokens for timing in done)
    num_out = sum(timing.num_output_tokens for timing in done)
    return Summary(
        duration_s=duration_s,
        completed=len(done),
        failed=len(timings) - len(done),
        total_input_tokens=num_in,
        total_output_tokens=num_out,
        request_throughput_rps=throughput(len(done), duration_s),
        output_throughput_tps=throughput(num_out, duration_s),
        total_token_throughput_tps=throughput(num_in + num_out, duration_s),
        request_goodput_rps=None if slo is None else goodput_rps(done, slo, duration_s),
        ttft_s=spread(map(ttft_s, done)),
        tpot_s=spread(map(tpot_s, done)),
        itl_s=spread(gap for timing in done for gap in itl_s(timing)),
        e2e_s=spread(map(e2e_s, done)),
    )


def vllm_fields(summary: Summary) -> dict[str, float | int | None]:
    """The summary under the field names of `vllm bench serve`'s result file (latencies in ms; None where nan)."""
    fields: dict[str, float | int | None] = {
        "duration": summary.duration_s,
        "completed": summary.completed,
        "failed": summary.failed,
        "total_input_tokens": summary.total_input_tokens,
        "total_output_tokens": summary.total_output_tokens,
        "request_throughput": summary.request_throughput_rps,
        "request_goodput": summary.request_goodput_rps,
        "output_throughput": summary.output_throughput_tps,
        "total_token_throughput": summary.total_token_throughput_tps,
    }
    named = {"ttft": summary.ttft_s, "tpot": summary.tpot_s, "itl": summary.itl_s, "e2el": summary.e2e_s}
    for name, values in named.items():
        for statistic in ("mean", "median", "std", "p50", "p95", "p99"):
            seconds = getattr(values, statistic)
            fields[f"{statistic}_{name}_ms"] = None if math.isnan(seconds) else 1000 * seconds
    return fields
