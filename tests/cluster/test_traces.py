"""Traces: the spans of requests as an OTLP receiver gets them; nothing at all while they are off."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from fakes import INFO, request
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from octavo.cluster.app import build_app
from octavo.cluster.config import DeploymentConfig
from octavo.cluster.ingress.app import create_app
from octavo.cluster.ingress.catalog import Catalog
from octavo.cluster.ingress.client import ReplicaLost
from octavo.cluster.ingress.grpc.servicer import Servicer
from octavo.cluster.ingress.service import Service
from octavo.cluster.ingress.settings import IngressSettings
from octavo.cluster.observability import traces
from octavo.cluster.observability.traces import NO_TRACER, make_tracer
from octavo.cluster.routing.failover import FailoverClient
from octavo.engine.build import assemble
from octavo.engine.config import EngineConfig
from octavo.engine.core.blocks import BlockPool
from octavo.engine.core.engine import EngineCore
from octavo.engine.core.limits import Limits
from octavo.engine.core.scheduler import Scheduler
from octavo.engine.errors import ConfigError
from octavo.engine.runner.fake import CostModel, FakeRunner, VirtualClock
from octavo.engine.text.byte_tokenizer import ByteTokenizer
from octavo.engine.types import EngineStats, PhaseTimes, Request
from octavo.protos.octavo.v1 import inference_pb2 as pb

ASKED = {"model": "fake", "prompt": "Once upon a time", "max_tokens": 12, "ignore_eos": True, "seed": 5}
PARENT = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
QUEUE_S, PREFILL_S = 0.01, 0.02


@contextmanager
def receiver():
    """An OTLP/HTTP receiver; → (its address, the spans it has got so far)."""
    spans: list = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/traces"
            data = self.rfile.read(int(self.headers["content-length"]))
            for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
                assert values(resource.resource)["service.name"] == "octavo"
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", spans
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def values(thing) -> dict:
    """The attributes of a span, an event or a resource."""
    found = {}
    for item in thing.attributes:
        kind = item.value.WhichOneof("value")
        value = getattr(item.value, kind)
        found[item.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return found


@dataclass
class Replicas:
    """Attempts, the first of which is lost after `lost_after` deltas (None: not). Times are told as they are known."""

    lost_after: int | None = None
    attempts: int = 0

    async def info(self):
        return INFO

    async def stats(self):
        return {"replica": EngineStats()}

    async def attempt(self, request: Request, accepted: Callable[[str], None], within_s=None, avoid=()):
        self.attempts += 1
        number = self.attempts
        accepted(f"replica-{number}")
        core = assemble(EngineConfig(model="fake"), INFO, FakeRunner(INFO.num_blocks, INFO.block_size)).core
        deltas = core.add(request)
        while core.has_work:
            deltas += core.step()
        assert [delta.times is not None for delta in deltas] == [True] + [False] * (len(deltas) - 1)
        await asyncio.sleep(0.05)
        deltas[0] = replace(deltas[0], times=PhaseTimes(QUEUE_S, PREFILL_S))
        for count, delta in enumerate(deltas):
            if number == 1 and count == self.lost_after:
                raise ReplicaLost("It was killed.")
            yield delta


def service(replicas, tracer):
    client = FailoverClient(replicas, 5.0)
    return Service(IngressSettings(served_model_names=("fake",)), client, ByteTokenizer(), tracer=tracer)


async def spans_of(body, path="/v1/completions", headers=None, lost_after=None):
    """The answer to `body`, and what the receiver got."""
    with receiver() as (endpoint, spans):
        tracer = make_tracer(endpoint)
        transport = httpx.ASGITransport(create_app([service(Replicas(lost_after), tracer)]))
        async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as http:
            answer = await http.post(path, json=body, headers=headers)
        await asyncio.to_thread(tracer.close)
        return answer, spans


def root_and_children(spans):
    (root,) = (span for span in spans if span.kind == span.SPAN_KIND_SERVER)
    others = (span for span in spans if span is not root)
    children = sorted(others, key=lambda span: (values(span)["octavo.attempt"], span.start_time_unix_nano))
    assert all(child.parent_span_id == root.span_id and child.trace_id == root.trace_id for child in children)
    return root, children


async def test_a_request_with_a_failover_in_it():
    answer, spans = await spans_of({**ASKED, "stream": True}, headers={**PARENT, "x-request-id": "r-1"}, lost_after=3)
    assert "[DONE]" in answer.text
    root, children = root_and_children(spans)
    assert root.name == "text_completion fake"
    assert root.trace_id.hex() == PARENT["traceparent"].split("-")[1]
    assert root.parent_span_id.hex() == PARENT["traceparent"].split("-")[2]
    about = values(root)
    assert about["gen_ai.request.model"] == "fake"
    assert about["gen_ai.request.max_tokens"] == 12
    assert about["gen_ai.request.stream"] is True
    assert about["gen_ai.usage.input_tokens"] == 1 + len(ASKED["prompt"])
    assert about["gen_ai.usage.output_tokens"] == 12
    assert about["gen_ai.usage.cache_read.input_tokens"] == 0
    assert about["gen_ai.response.finish_reasons"] == ["length"]
    assert about["gen_ai.response.time_to_first_chunk"] > QUEUE_S + PREFILL_S
    assert about["octavo.request_id"] == "r-1"
    assert about["octavo.resumptions"] == 1
    assert about["http.response.status_code"] == 200
    assert root.status.code == root.status.STATUS_CODE_UNSET

    phases = ["route", "queue", "prefill", "decode"]
    assert [(c.name, values(c)["octavo.attempt"], values(c)["octavo.replica_id"]) for c in children] == [
        (name, attempt, f"replica-{attempt}") for attempt in (1, 2) for name in phases
    ]
    for first in (0, 4):
        attempt = children[first : first + 4]
        for before, after in pairwise(attempt):
            assert before.end_time_unix_nano == after.start_time_unix_nano
        seconds = [(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 for span in attempt]
        assert seconds[1:3] == pytest.approx([QUEUE_S, PREFILL_S], abs=1e-5)
        assert root.start_time_unix_nano <= attempt[0].start_time_unix_nano
        assert attempt[-1].end_time_unix_nano <= root.end_time_unix_nano
    assert children[3].end_time_unix_nano <= children[4].start_time_unix_nano

    (loss,) = root.events
    assert loss.name == "octavo.replica_lost"
    assert values(loss) == {
        "octavo.attempt": 1,
        "octavo.replica_id": "replica-1",
        "error.type": "ReplicaLost",
        "exception.message": "It was killed.",
    }
    assert abs(loss.time_unix_nano - children[3].end_time_unix_nano) < 1e6
    broken = [child for child in children if child.status.code == child.status.STATUS_CODE_ERROR]
    assert broken == [children[3]]


async def test_lost_before_its_first_token():
    _, spans = await spans_of(ASKED, lost_after=0)
    root, children = root_and_children(spans)
    assert [child.name for child in children] == ["route", "route", "queue", "prefill", "decode"]
    assert [values(event)["octavo.replica_id"] for event in root.events] == ["replica-1"]


async def test_without_a_parent_it_begins_a_trace():
    _, spans = await spans_of({**ASKED, "prompt": ["One", "Two"], "n": 2, "temperature": 1.0})
    root, children = root_and_children(spans)
    assert root.parent_span_id == b""
    assert values(root)["gen_ai.response.finish_reasons"] == ["length"] * 4
    assert values(root)["gen_ai.request.choice.count"] == 2
    assert sorted((values(child)["octavo.prompt"], child.name) for child in children) == [
        (prompt, name) for prompt in (0, 1) for name in ("decode", "prefill", "queue", "route")
    ]


async def test_a_refusal_is_the_client_s_error():
    answer, spans = await spans_of({**ASKED, "temperature": -1})
    assert answer.status_code == 400
    (root,) = spans
    assert values(root)["http.response.status_code"] == 400
    assert values(root)["error.type"] == "RequestError"
    assert root.status.code == root.status.STATUS_CODE_UNSET


async def test_what_does_not_generate_is_not_traced():
    _, spans = await spans_of({"model": "fake", "prompt": "Hi"}, "/tokenize", PARENT)
    assert spans == []


async def test_grpc():
    class Context:
        def invocation_metadata(self):
            return list(PARENT.items())

        def peer(self):
            return "ipv4:127.0.0.1:1"

        def set_trailing_metadata(self, metadata):
            pass

    with receiver() as (endpoint, spans):
        tracer = make_tracer(endpoint)
        servicer = Servicer(Catalog([service(Replicas(), tracer)]))
        asked = pb.GenerationRequest(text="Hi", params={"max_tokens": 5, "ignore_eos": True})
        answer = await servicer.generate_unary(asked.SerializeToString(), Context())
        assert answer.usage.completion_tokens == 5
        await asyncio.to_thread(tracer.close)
    root, children = root_and_children(spans)
    assert root.parent_span_id.hex() == PARENT["traceparent"].split("-")[2]
    assert values(root)["rpc.response.status_code"] == "OK"
    assert [child.name for child in children] == ["route", "queue", "prefill", "decode"]


async def test_a_receiver_that_is_not_there_costs_nothing_but_its_traces(monkeypatch):
    monkeypatch.setattr("octavo.cluster.observability.otlp.CLOSE_S", 0.2)
    tracer = make_tracer("http://127.0.0.1:9/v1/traces")
    transport = httpx.ASGITransport(create_app([service(Replicas(), tracer)]))
    async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as http:
        assert (await http.post("/v1/completions", json=ASKED)).status_code == 200
    begun = asyncio.get_running_loop().time()
    await asyncio.to_thread(tracer.close)
    assert asyncio.get_running_loop().time() - begun < 2


def test_the_engine_says_how_long_it_waited_and_computed():
    clock = VirtualClock()
    runner = FakeRunner(64, 16, cost=CostModel(step_s=1.0), sleep=clock.sleep)
    limits = Limits(block_size=16, max_model_len=256, max_num_seqs=1, max_num_batched_tokens=8, vocab_size=258)
    core = EngineCore(Scheduler(limits, BlockPool(64, True)), runner, clock, lag=0)
    core.add(request("a", prompt=8, max_tokens=3))  # three steps
    core.add(request("b", prompt=20, max_tokens=2))  # waits for a; its prompt takes three
    found = {}
    while core.has_work:
        for delta in core.step():
            found.setdefault(delta.request_id, []).append(delta.times)
    assert found == {
        "a": [PhaseTimes(0.0, 1.0), None, None],
        "b": [PhaseTimes(3.0, 3.0), None],
    }


OFF = """
import asyncio, sys
import httpx
from octavo.cluster.ingress.app import create_app
from octavo.cluster.observability.traces import make_tracer
from scripted import ScriptedClient
from octavo.cluster.ingress.service import Service
from octavo.cluster.ingress.settings import IngressSettings
from octavo.engine.text.byte_tokenizer import ByteTokenizer

async def main():
    settings = IngressSettings(served_model_names=("scripted",))
    app = create_app([Service(settings, ScriptedClient(), ByteTokenizer(), tracer=make_tracer(None))])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://octavo") as http:
        answer = await http.post("/v1/completions", json={"prompt": "Hi"}, headers={"traceparent": "00-1-1-01"})
        assert answer.status_code == 200, answer.text

asyncio.run(main())
# FastAPI imports the API for itself.
ours = ("octavo.cluster.observability.otlp", "opentelemetry.sdk", "opentelemetry.exporter")
print([name for name in sys.modules if name.startswith(ours)])
"""


def test_off_means_that_nothing_is_imported():
    here = Path(__file__).parent  # where `scripted` is
    said = subprocess.run(
        [sys.executable, "-c", OFF], cwd=here, capture_output=True, text=True, timeout=60, check=False
    )
    assert said.stdout == "[]\n", said.stderr


def test_without_the_exporter_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(traces, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"octavo\[traces\]"):
        build_app({"model": "fake", "otlp_traces_endpoint": "http://127.0.0.1:4318"})
    assert make_tracer(None) is NO_TRACER


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "grpc://127.0.0.1:4317", "http:///v1/traces", ""])
def test_an_endpoint_is_a_url(endpoint):
    with pytest.raises(ConfigError, match="otlp_traces_endpoint must be"):
        DeploymentConfig(otlp_traces_endpoint=endpoint)
