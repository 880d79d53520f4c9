"""An error as Anthropic's clients know errors: their envelope, their types."""

from __future__ import annotations

from octavo.cluster.ingress.errors import Failure

# Statuses stay what they are for every client. Too many requests are 429 and not Anthropic's 529: it is what balancers
# and other clients understand, and comes with the same Retry-After. Where a replica was lost, 503 says "overloaded".
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def enveloped(failure: Failure, request_id: str) -> Failure:
    kind = _TYPES.get(failure.status, "invalid_request_error" if failure.status < 500 else "api_error")
    error = {"type": kind, "message": failure.body["error"]["message"]}
    if failure.body["error"]["param"] == "thread":  # tells the client's tool runner to send whole conversations instead
        error["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return Failure(failure.status, {"type": "error", "error": error, "request_id": request_id}, failure.headers)
