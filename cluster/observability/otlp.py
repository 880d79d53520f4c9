"""OpenTelemetry spans of requests: names and attributes of its GenAI semantic conventions where there are such.

One span per client's request, which goes on a trace that its headers name (W3C traceparent). Below it, for each attempt
at each engine request, its phases, one behind the other, with `octavo.replica_id` and `octavo.attempt`:

    route    submitted, until a replica has accepted it
    queue    until the engine planned its first row
    prefill  until its first token
    decode   until its last token, or until the replica was lost

A loss is an event of the request's span, and the error of the phase it cut off; an attempt that was lost before its
first token shows its route alone. How long the engine took are durations of its own clock, laid behind the moment at
which this process heard that the request is accepted: clocks of different machines are never compared.

While a request runs, times are only noted; spans are made at its end, and sent on a thread of the SDK.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace import Tracer as OpenTelemetryTracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from octavo.cluster.observability.metrics import INGRESS
from octavo.cluster.observability.traces import NO_TRACE, Asked, Generated, Journey, Trace, Tracer
from octavo.engine.errors import CapacityError, RequestError
from octavo.engine.params import SamplingParams
from octavo.engine.types import PhaseTimes

EXPORT_S = 10.0
CLOSE_S = 5.0  # an ingress that stops waits no longer for the receiver
PATH = "/v1/traces"


def make_otlp_tracer(endpoint: str) -> OtlpTracer:
    """endpoint: the receiver's URL; without a path, OTLP's own is added."""
    url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + PATH
    return OtlpTracer(OTLPSpanExporter(url, timeout=EXPORT_S))


class OtlpTracer(Tracer):
    """OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES and OTEL_TRACES_SAMPLER mean what they always do."""

    def __init__(self, exporter: SpanExporter) -> None:
        own = Resource({"service.name": "octavo", "service.instance.id": INGRESS})
        self._provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("octavo")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, asked: Asked) -> Trace:
        # One moment on both clocks: from then on this process's monotonic one counts.
        offset_ns = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            f"{asked.operation} {asked.model}",
            self._propagator.extract(asked.headers),
            SpanKind.SERVER,
            {
                "gen_ai.operation.name": asked.operation,
                "gen_ai.provider.name": "octavo",
                "gen_ai.request.model": asked.model,
                "octavo.request_id": asked.request_id,
            },
            start_time=offset_ns + int(asked.arrival_time * 1e9),
        )
        return _OtlpTrace(self._tracer, span, offset_ns) if span.is_recording() else NO_TRACE

    def close(self) -> None:
        closing = threading.Thread(target=self._provider.shutdown, name="traces-close", daemon=True)
        closing.start()
        closing.join(CLOSE_S)


@dataclass(frozen=True, slots=True)
class _Phase:
    """Times: monotonic seconds."""

    name: str
    begin: float
    end: float
    attempt: int
    replica: str
    error: Exception | None


class _OtlpJourney(Journey):
    def __init__(self, prompt: int) -> None:
        self.prompt = prompt
        self.attempts = 0
        self.phases: list[_Phase] = []
        self.losses: list[tuple[float, int, str, Exception]] = []  # (when, attempt, replica, why)
        self._replica = ""
        self._accepted_at = 0.0
        self._open: tuple[str, float] | None = None  # the phase that has begun, and when

    def submitted(self) -> None:
        self.attempts += 1
        self._replica, self._open = "", ("route", time.monotonic())

    def accepted(self, replica: str) -> None:
        self._replica, self._accepted_at = replica, time.monotonic()
        self._close(self._accepted_at)

    def began(self, times: PhaseTimes) -> None:
        now = time.monotonic()
        started = min(now, self._accepted_at + times.queue_s)
        first = min(now, started + times.prefill_s)
        self._note("queue", self._accepted_at, started)
        self._note("prefill", started, first)
        self._open = "decode", first

    def lost(self, error: Exception) -> None:
        now = time.monotonic()
        self._close(now, error)
        self.losses.append((now, self.attempts, self._replica, error))

    def ended(self) -> None:
        self._close(time.monotonic())

    def _close(self, now: float, error: Exception | None = None) -> None:
        if self._open is not None:
            self._note(*self._open, now, error)
            self._open = None

    def _note(self, name: str, begin: float, end: float, error: Exception | None = None) -> None:
        self.phases.append(_Phase(name, begin, end, self.attempts, self._replica, error))


class _OtlpTrace(Trace):
    """offset_ns: what makes the monotonic clock's nanoseconds Unix time."""

    def __init__(self, tracer: OpenTelemetryTracer, span: Span, offset_ns: int) -> None:
        self._tracer = tracer
        self._span = span
        self._offset_ns = offset_ns
        self._journeys: list[_OtlpJourney] = []

    def journey(self, prompt: int) -> Journey:
        self._journeys.append(_OtlpJourney(prompt))
        return self._journeys[-1]

    def understood(self, params: SamplingParams, answer_id: str, stream: bool) -> None:
        found: dict[str, AttributeValue | None] = {
            "gen_ai.response.id": answer_id,
            "gen_ai.request.stream": stream,
            "gen_ai.request.choice.count": params.n if params.n > 1 else None,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k or None,
            "gen_ai.request.frequency_penalty": params.frequency_penalty or None,
            "gen_ai.request.presence_penalty": params.presence_penalty or None,
            "gen_ai.request.seed": params.seed,
        }
        self._span.set_attributes({name: value for name, value in found.items() if value is not None})

    def generated(self, what: Generated) -> None:
        self._span.set_attributes(
            {
                "gen_ai.usage.input_tokens": what.num_prompt_tokens,
                "gen_ai.usage.output_tokens": what.num_completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": what.num_cached_tokens,
                "gen_ai.response.finish_reasons": [reason for reason in what.finish_reasons if reason is not None],
            }
        )
        if what.ttft_s is not None:
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", what.ttft_s)

    def failed(self, error: Exception) -> None:
        self._span.set_attribute("error.type", type(error).__name__)
        # As for HTTP: what the client did wrong, or is to try again later, is no error of the server.
        if not isinstance(error, RequestError | CapacityError):
            self._span.set_status(StatusCode.ERROR, str(error))

    def end(self, status: int | str) -> None:
        name = "http.response.status_code" if isinstance(status, int) else "rpc.response.status_code"
        self._span.set_attribute(name, status)
        self._span.set_attribute("octavo.resumptions", sum(max(0, j.attempts - 1) for j in self._journeys))
        for journey in self._journeys:
            journey.ended()
            self._draw(journey)
        self._span.end(self._unix_ns(time.monotonic()))

    def _draw(self, journey: _OtlpJourney) -> None:
        parent = set_span_in_context(self._span)
        common: dict[str, AttributeValue] = {"octavo.prompt": journey.prompt} if len(self._journeys) > 1 else {}
        for phase in journey.phases:
            about: dict[str, AttributeValue] = {
                **common,
                "octavo.attempt": phase.attempt,
                "octavo.replica_id": phase.replica,
            }
            begin = self._unix_ns(phase.begin)
            span = self._tracer.start_span(phase.name, parent, attributes=about, start_time=begin)
            if phase.error is not None:
                span.set_attribute("error.type", type(phase.error).__name__)
                span.set_status(StatusCode.ERROR, str(phase.error))
            span.end(self._unix_ns(phase.end))
        for at, attempt, replica, error in journey.losses:
            about = {
                **common,
                "octavo.attempt": attempt,
                "octavo.replica_id": replica,
                "error.type": type(error).__name__,
                "exception.message": str(error),
            }
            self._span.add_event("octavo.replica_lost", about, self._unix_ns(at))

    def _unix_ns(self, monotonic_s: float) -> int:
        return self._offset_ns + int(monotonic_s * 1e9)
