"""/metrics: it parses, the names are vLLM's, and the counts are right."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from octavo.cluster.observability.metrics import Finished, IngressMetrics, exposition, token_buckets
from octavo.engine.errors import CapacityError
from octavo.engine.params import SamplingParams
from octavo.engine.types import EngineStats

HI = {"messages": [{"role": "user", "content": "Hi"}], "model": "scripted"}
PATH = "/v1/chat/completions"


async def scrape(http):
    response = await http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return parse(response.text)


def parse(text):
    """(sample name without prefix, labels besides the model's name and the process) → value"""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "scripted"
            # What the engines know is the same whoever is asked; what an ingress has counted is its own.
            assert ("ingress" in labels) != ("engine" in labels)
            labels.pop("ingress", None)
            assert sample.name.startswith("octavo:")
            key = (sample.name.removeprefix("octavo:"), *sorted(labels.values()))
            assert key not in found, key
            found[key] = sample.value
    return found


async def test_counts(harness):
    client = harness.Client(
        replies=("abcd",),
        stats_value=[
            EngineStats(
                num_running=2, num_waiting=3, kv_blocks_total=8, kv_blocks_held=2, prompt_tokens=70,
                generation_tokens=9, prefix_queries=70, prefix_hits=32, preemptions=1,
            ),
            EngineStats(num_running=5),
        ],
    )  # fmt: skip
    async with harness.http(client) as http:
        await http.post(PATH, json={**HI, "max_tokens": 50})
        await http.post(PATH, json={**HI, "max_tokens": 2, "stream": True, "n": 2})
        await http.post(PATH, json={**HI, "max_tokens": 0})
        client.fail = CapacityError("Full.")
        await http.post(PATH, json=HI)
        metrics = await scrape(http)
    assert metrics["request_success_total", "stop"] == 1
    assert metrics["request_success_total", "length"] == 1
    assert metrics["request_success_total", "abort"] == metrics["request_success_total", "error"] == 0
    assert metrics["admission_rejections_total", "max_num_queued_reqs"] == 1
    assert metrics[("time_to_first_token_seconds_count",)] == 2
    assert metrics[("e2e_request_latency_seconds_count",)] == 2
    assert metrics[("inter_token_latency_seconds_count",)] == 4 + 2 * 1
    assert metrics[("request_time_per_output_token_seconds_count",)] == 2
    assert metrics[("request_prompt_tokens_sum",)] == 2 * 22
    assert metrics[("request_generation_tokens_sum",)] == 5 + 4
    assert (metrics[("request_params_n_sum",)], metrics[("request_params_max_tokens_sum",)]) == (3, 52)
    assert metrics["num_requests_running", "replica-0"] == 2
    assert metrics["num_requests_running", "replica-1"] == 5
    assert metrics["num_requests_waiting", "replica-0"] == 3
    assert metrics["kv_cache_usage_perc", "replica-0"] == 0.25
    assert metrics["prefix_cache_queries_total", "replica-0"] == 70
    assert metrics["prefix_cache_hits_total", "replica-0"] == 32
    assert metrics["num_preemptions_total", "replica-0"] == 1
    assert metrics["prompt_tokens_total", "replica-0"] == 70
    assert metrics["generation_tokens_total", "replica-0"] == 9


async def test_two_applications_do_not_share_counts(harness):
    async with harness.http(harness.Client()) as one, harness.http(harness.Client()) as other:
        await one.post(PATH, json=HI)
        await other.get("/health")
        assert (await scrape(one))["request_success_total", "stop"] == 1
        assert (await scrape(other))["request_success_total", "stop"] == 0


def test_tokens_that_come_together_share_their_gap():
    metrics = IngressMetrics("scripted", 100)
    metrics.started(5, SamplingParams(max_tokens=None))
    metrics.next_tokens(0.4, 4)
    metrics.finished(Finished("stop", 5, 1.0, 0.4))
    found = parse(exposition([(metrics, {})]).decode())
    assert found[("inter_token_latency_seconds_count",)] == 4
    assert found[("inter_token_latency_seconds_sum",)] == pytest.approx(0.4)
    assert found["inter_token_latency_seconds_bucket", "0.1"] == 4
    assert found[("request_time_per_output_token_seconds_sum",)] == pytest.approx(0.1)
    assert found[("request_params_max_tokens_count",)] == 0


def test_buckets():
    assert token_buckets(100) == (1, 2, 5, 10, 20, 50, 100)
    assert token_buckets(4096)[-1] == 2000
