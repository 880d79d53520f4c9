"""What a call's status means: octavo's exceptions. The inverse of ingress/grpc/status.py."""

from __future__ import annotations

import grpc

from octavo.engine.errors import CapacityError, NotFoundError, OctavoError, RequestError


class Unauthorized(OctavoError):
    """The server wants an API key, or another one."""


class DeadlineExceeded(OctavoError):
    """The answer was not complete by the call's deadline, or within the time the server allows."""


class Unavailable(OctavoError):
    """The server cannot be reached, or has no engine to give the request to: worth trying again."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (str(self), self.retry_after_s))


class Cancelled(OctavoError):
    """The call was cancelled: by closing the client, say."""


class ServerFailed(OctavoError):
    """A bug of the server's, or something on the way to it that does not speak octavo's gRPC."""


def exception(error: grpc.RpcError) -> OctavoError:
    """What to raise for a call that ended with `error`."""
    code, details = error.code(), error.details() or ""
    metadata = {key: value for key, value in (error.trailing_metadata() or ()) if isinstance(value, str)}
    retry_after_s = int(metadata["retry-after"]) if metadata.get("retry-after", "").isdecimal() else 1
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT:
            return RequestError(details, metadata.get("octavo-field"))
        case grpc.StatusCode.NOT_FOUND:
            return NotFoundError(details, metadata.get("octavo-field"))
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return CapacityError(details, retry_after_s)
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            return Unauthorized(details)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(details)
        case grpc.StatusCode.UNAVAILABLE:
            return Unavailable(details, retry_after_s)
        case grpc.StatusCode.CANCELLED:
            return Cancelled(details)
        case _:
            return ServerFailed(f"{code.name}: {details}")
