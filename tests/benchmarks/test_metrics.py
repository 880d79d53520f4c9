"""Every formula against values computed by hand."""

import math

import numpy as np
import pytest
from metrics import Slo, Timing, e2e_s, goodput_rps, itl_s, percentile, spread, summarize, tpot_s, ttft_s, vllm_fields

STEADY = Timing(
    start_s=10.0, end_s=11.5, num_prompt_tokens=7, num_output_tokens=5, token_times_s=(10.5, 10.6, 10.8, 10.8, 11.3)
)
FAILED = Timing(
    start_s=10.0, end_s=99.0, num_prompt_tokens=1000, num_output_tokens=3, token_times_s=(60.0, 99.0), error="HTTP 500"
)
ONE_TOKEN = Timing(start_s=0.0, end_s=0.3, num_prompt_tokens=2, num_output_tokens=1, token_times_s=(0.25,))


def test_latencies_of_one_request():
    assert ttft_s(STEADY) == pytest.approx(0.5)
    assert tpot_s(STEADY) == pytest.approx((11.3 - 10.5) / 4)
    assert itl_s(STEADY) == pytest.approx([0.1, 0.2, 0.0, 0.5])
    assert e2e_s(STEADY) == pytest.approx(1.3)


def test_tpot_counts_tokens_not_chunks():
    three_chunks = Timing(0.0, 3.0, 1, num_output_tokens=9, token_times_s=(1.0, 2.0, 3.0))
    assert tpot_s(three_chunks) == pytest.approx(2.0 / 8)


def test_what_a_request_does_not_have_is_none():
    assert tpot_s(ONE_TOKEN) is None
    assert itl_s(ONE_TOKEN) == []
    silent = Timing(1.0, 4.0, 1, 0)
    assert ttft_s(silent) is None
    assert e2e_s(silent) == 3.0


def test_percentile_is_linear_between_neighbours():
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0], 95) == pytest.approx(1.95)
    assert percentile([7.0], 99) == 7.0
    assert math.isnan(percentile([], 50))
    values = list(np.random.default_rng(0).exponential(size=37))
    for q in (0, 50, 95, 99, 100):
        assert percentile(values, q) == pytest.approx(np.percentile(values, q))


def test_spread_leaves_out_none():
    found = spread([1.0, None, 3.0])
    assert (found.mean, found.median, found.std, found.p50) == (2.0, 2.0, 1.0, 2.0)
    assert math.isnan(spread([None]).p99)


def test_a_failed_request_is_counted_and_enters_no_latency_and_no_throughput():
    summary = summarize([STEADY, FAILED], duration_s=2.0)
    assert (summary.completed, summary.failed) == (1, 1)
    assert (summary.total_input_tokens, summary.total_output_tokens) == (7, 5)
    assert summary.request_throughput_rps == 0.5
    assert summary.output_throughput_tps == 2.5
    assert summary.total_token_throughput_tps == 6.0
    assert summary.ttft_s.p99 == pytest.approx(0.5)
    assert summary.itl_s.mean == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("slo", "kept"),
    [
        (Slo(), True),
        (Slo(ttft_s=0.51, tpot_s=0.21, e2e_s=1.31), True),
        (Slo(ttft_s=0.49), False),
        (Slo(tpot_s=0.19), False),
        (Slo(e2e_s=1.29), False),
    ],
)
def test_slo(slo, kept):
    assert slo.kept(STEADY) is kept
    assert slo.kept(FAILED) is False


def test_goodput():
    slo = Slo(ttft_s=0.4, tpot_s=0.1)
    assert slo.kept(ONE_TOKEN), "one token has no TPOT to break"
    assert goodput_rps([STEADY, FAILED, ONE_TOKEN, ONE_TOKEN], slo, duration_s=4.0) == 0.5


def test_vllm_field_names():
    fields = vllm_fields(summarize([STEADY], 2.0, Slo(ttft_s=1.0)))
    assert fields["mean_ttft_ms"] == pytest.approx(500)
    assert fields["p99_e2el_ms"] == pytest.approx(1300)
    assert fields["request_goodput"] == 0.5
    assert fields["output_throughput"] == 2.5
    nothing = vllm_fields(summarize([], 2.0))
    assert nothing["median_tpot_ms"] is None
    assert nothing["request_goodput"] is None
