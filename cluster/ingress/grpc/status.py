"""What an exception means over gRPC: a canonical code, details and trailing metadata. The only place that knows."""

from __future__ import annotations

from dataclasses import dataclass

from grpc import StatusCode

from octavo.cluster.ingress.client import ReplicaLost
from octavo.cluster.ingress.errors import Interrupted, TimedOut, TooLarge, Unauthorized
from octavo.engine.errors import CapacityError, NotFoundError, RankLost, RequestError

# Trailing metadata; inference.proto says what they mean. The last one is gRPC's own (proposal A6).
FIELD = "octavo-field"
RETRY_AFTER = "retry-after"
PUSHBACK = "grpc-retry-pushback-ms"
REQUEST_ID = "x-request-id"
MAX_DETAILS = 2000  # characters; headers have little room


@dataclass(frozen=True, slots=True)
class RpcFailure:
    code: StatusCode
    details: str
    metadata: tuple[tuple[str, str], ...] = ()


def rpc_failure(error: BaseException) -> RpcFailure:
    """Never shows what an unexpected exception says: that is for the log."""
    match error:
        case NotFoundError():
            return RpcFailure(StatusCode.NOT_FOUND, _short(error.message), _field(error.param))
        case RequestError():
            return RpcFailure(StatusCode.INVALID_ARGUMENT, _short(error.message), _field(error.param))
        case TooLarge():  # not RESOURCE_EXHAUSTED: that reads as "try again"
            return RpcFailure(StatusCode.INVALID_ARGUMENT, _short(str(error)))
        case Unauthorized():
            return RpcFailure(StatusCode.UNAUTHENTICATED, str(error))
        case TimedOut():
            return RpcFailure(StatusCode.DEADLINE_EXCEEDED, str(error))
        case CapacityError():
            return RpcFailure(StatusCode.RESOURCE_EXHAUSTED, _short(error.message), _retry(error.retry_after_s))
        case ReplicaLost() | RankLost() | Interrupted():
            return RpcFailure(StatusCode.UNAVAILABLE, _short(str(error)), _retry(1))
        case _:
            return RpcFailure(StatusCode.INTERNAL, "Internal error; the log has the details.")


def _short(message: str) -> str:
    return message if len(message) <= MAX_DETAILS else message[: MAX_DETAILS - 1] + "…"


def _field(param: str | None) -> tuple[tuple[str, str], ...]:
    if not param:
        return ()
    # Clients choose some names; metadata takes printable ASCII.
    return ((FIELD, "".join(c if " " <= c <= "~" else "?" for c in param[:200])),)


def _retry(seconds: float) -> tuple[tuple[str, str], ...]:
    seconds = max(1, round(seconds))
    return ((RETRY_AFTER, str(seconds)), (PUSHBACK, str(1000 * seconds)))
