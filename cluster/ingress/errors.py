"""What an exception means over HTTP: a status, headers and OpenAI's error body. The only place that knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from logging import Logger
from typing import Any

from starlette.exceptions import HTTPException

from octavo.cluster.ingress import replies
from octavo.cluster.ingress.client import ReplicaLost
from octavo.engine.errors import CapacityError, NotFoundError, OctavoError, RankLost, RequestError


class Unauthorized(OctavoError):
    """No valid API key."""


class TooLarge(OctavoError):
    """The request body is longer than allowed."""


class TimedOut(OctavoError):
    """The request took longer than the server allows."""


class Interrupted(OctavoError):
    """The engine ended the request without being asked to: it is shutting down, say. Worth trying again."""


@dataclass(frozen=True, slots=True)
class Failure:
    status: int
    body: dict[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)


def failure(error: BaseException) -> Failure:
    """Never shows what an unexpected exception says: that is for the log."""
    match error:
        case NotFoundError():
            code = "model_not_found" if error.param == "model" else "not_found"
            return Failure(404, replies.error(error.message, "invalid_request_error", error.param, code))
        case RequestError():
            return Failure(400, replies.error(error.message, "invalid_request_error", error.param, None))
        case Unauthorized():
            body = replies.error(str(error), "authentication_error", None, "invalid_api_key")
            return Failure(401, body, {"WWW-Authenticate": "Bearer"})
        case TooLarge():
            return Failure(413, replies.error(str(error), "invalid_request_error", None, "request_too_large"))
        case TimedOut():
            return Failure(408, replies.error(str(error), "timeout_error", None, "request_timeout"))
        case CapacityError():
            body = replies.error(error.message, "rate_limit_error", None, "overloaded")
            return Failure(429, body, {"Retry-After": str(max(1, error.retry_after_s))})
        case ReplicaLost() | RankLost() | Interrupted():
            return Failure(503, replies.error(str(error), "server_error", None, "unavailable"), {"Retry-After": "1"})
        case HTTPException():
            return _http(error)
        case _:
            return Failure(500, replies.error("Internal error; the log has the details.", "server_error", None, None))


def log_failure(logger: Logger, request_id: str, error: BaseException) -> None:
    """One line for what can happen; where it happened only for what nobody thought of."""
    if isinstance(error, ReplicaLost | RankLost | Interrupted):
        logger.error("request %s failed: %s", request_id, error)
    else:
        logger.error("request %s failed", request_id, exc_info=error)


def _http(error: HTTPException) -> Failure:
    message = {
        404: "There is nothing at this path.",
        405: "This path does not take that method.",
    }.get(error.status_code, error.detail or HTTPStatus(error.status_code).phrase)
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return Failure(error.status_code, replies.error(message, kind, None, None), error.headers or {})
