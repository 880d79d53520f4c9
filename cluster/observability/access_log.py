"""The access log: one line per HTTP request, in `key=value` pairs, on the logger `octavo.access`."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from starlette.types import Scope

logger = logging.getLogger("octavo.access")

# Asked for every few seconds by probes and scrapers: worth a line only when something is wrong.
QUIET_PATHS = frozenset({"/health", "/ping", "/metrics"})


@dataclass(slots=True)
class AccessRecord:
    """What an endpoint adds to its line; None = does not apply."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ttft_s: float | None = None
    outcome: str | None = None  # the finish reason, or why there is none


def log_access(scope: Scope, request_id: str, status: int, seconds: float, record: AccessRecord) -> None:
    """`status` 0: the client left before an answer was begun."""
    level = logging.DEBUG if scope["path"] in QUIET_PATHS and status < 400 else logging.INFO
    if not logger.isEnabledFor(level):
        return
    client = scope.get("client")
    pairs: list[tuple[str, object]] = [
        ("id", request_id),
        ("client", client[0] if client else "-"),
        ("status", status or "-"),
        ("prompt_tokens", record.prompt_tokens),
        ("completion_tokens", record.completion_tokens),
        ("ttft_ms", None if record.ttft_s is None else f"{record.ttft_s * 1e3:.1f}"),
        ("total_ms", f"{seconds * 1e3:.1f}"),
        ("outcome", record.outcome),
    ]
    rest = " ".join(f"{name}={value}" for name, value in pairs if value is not None)
    # %r keeps line ends that a client put into its path from making lines of their own
    logger.log(level, "%s %r %s", scope["method"], scope["path"], rest)
