"""Traces: what the parts of an ingress say of a request on its way, to whoever draws its picture from it.

The classes here note nothing: they are what is called while traces are off, and name what there is to be told. Those
that send OpenTelemetry spans are in otlp.py, which nothing imports before an endpoint is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, Protocol

from octavo.engine.errors import ConfigError
from octavo.engine.params import SamplingParams
from octavo.engine.types import FinishReason, PhaseTimes

# As OpenTelemetry calls them, where it has a name.
Operation = Literal["chat", "text_completion", "embeddings", "score", "rerank", "classify", "pooling"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A client's request as it comes in. headers: HTTP's or gRPC's, names in lower case. arrival_time: monotonic."""

    operation: Operation
    model: str
    request_id: str
    arrival_time: float
    headers: Mapping[str, str]


class Generated(Protocol):
    """What came of a request: `octavo.cluster.ingress.generation.Generation`."""

    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_completion_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def ttft_s(self) -> float | None: ...
    @property
    def finish_reasons(self) -> tuple[FinishReason | None, ...]: ...


class Journey:
    """One engine request, from replica to replica. Each attempt begins with `submitted`."""

    def submitted(self) -> None:
        """It is on its way to a replica."""

    def accepted(self, replica: str) -> None:
        """`replica` has it."""

    def began(self, times: PhaseTimes) -> None:
        """Its first token from this replica is there."""

    def lost(self, error: Exception) -> None:
        """The attempt is over; there may be another."""

    def ended(self) -> None:
        """It is over, however it ended. Said by who asked for the journey; the rest by an EngineClient."""


class Trace:
    """One client's request at an ingress. `end` is called once and last."""

    def journey(self, prompt: int) -> Journey:
        """Of the request's prompt of this number."""
        return NO_JOURNEY

    def understood(self, params: SamplingParams, answer_id: str, stream: bool) -> None: ...

    def generated(self, what: Generated) -> None: ...

    def failed(self, error: Exception) -> None: ...

    def end(self, status: int | str) -> None:
        """The answer is out. status: HTTP's or gRPC's; "-" if there was none."""


class Tracer:
    """One per ingress process."""

    def begin(self, asked: Asked) -> Trace:
        return NO_TRACE

    def close(self) -> None:
        """Send what waits. May take seconds."""


NO_JOURNEY, NO_TRACE, NO_TRACER = Journey(), Trace(), Tracer()


def require_exporter(endpoint: str | None) -> None:
    """Raises ConfigError if traces are to go to `endpoint` and what sends them is not installed."""
    if endpoint is None:
        return
    try:
        found = find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:  # of a package above it
        found = None
    if found is None:
        raise ConfigError("otlp_traces_endpoint needs the OTLP exporter: pip install 'octavo[traces]'.")


def make_tracer(endpoint: str | None) -> Tracer:
    """endpoint: URL of an OTLP/HTTP receiver; None = no traces. Raises ConfigError."""
    if endpoint is None:
        return NO_TRACER
    require_exporter(endpoint)
    from octavo.cluster.observability.otlp import make_otlp_tracer

    return make_otlp_tracer(endpoint)
