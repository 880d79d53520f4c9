"""The access log: one line per request, HTTP or gRPC, in `key=value` pairs, on the logger `octavo.access`."""

from __future__ import annotations

import logging
from dataclasses import dataclass

logger = logging.getLogger("octavo.access")

# Asked for every few seconds by probes and scrapers: worth a line only when something is wrong.
QUIET_PATHS = frozenset({"/health", "/ping", "/metrics", "/grpc.health.v1.Health/Check"})


@dataclass(slots=True)
class AccessRecord:
    """What an endpoint adds to its line; None = does not apply."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ttft_s: float | None = None
    outcome: str | None = None  # the finish reason, or why there is none


@dataclass(frozen=True, slots=True)
class Access:
    """What was asked by whom, and the answer. `status`: HTTP's or gRPC's; "-" if the client left before one."""

    method: str
    path: str
    client: str
    status: int | str
    ok: bool


def log_access(what: Access, request_id: str, seconds: float, record: AccessRecord) -> None:
    level = logging.DEBUG if what.path in QUIET_PATHS and what.ok else logging.INFO
    if not logger.isEnabledFor(level):
        return
    pairs: list[tuple[str, object]] = [
        ("id", request_id),
        ("client", what.client),
        ("status", what.status),
        ("prompt_tokens", record.prompt_tokens),
        ("completion_tokens", record.completion_tokens),
        ("ttft_ms", None if record.ttft_s is None else f"{record.ttft_s * 1e3:.1f}"),
        ("total_ms", f"{seconds * 1e3:.1f}"),
        ("outcome", record.outcome),
    ]
    rest = " ".join(f"{name}={value}" for name, value in pairs if value is not None)
    # %r keeps line ends that a client put into its path from making lines of their own
    logger.log(level, "%s %r %s", what.method, what.path, rest)
