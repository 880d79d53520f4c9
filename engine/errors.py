"""Errors by whose fault they are.

OctavoError
├── ConfigError      before start: an impossible configuration; one sentence that says what to change
├── RequestError     the client's fault (HTTP 4xx): that request alone ends
│   └── NotFoundError    the named thing (a model, say) does not exist (HTTP 404)
├── CapacityError    too much work right now (HTTP 429, or 503): try again later
├── StepError        a bug: the requests of the step fail, serving goes on
└── RankLost         a worker died or hung: the replica restarts
"""

from __future__ import annotations


class OctavoError(Exception):
    """Base of every error octavo raises on purpose."""


class ConfigError(OctavoError):
    """The configuration cannot work. The message is one sentence that says what to change."""


class RequestError(OctavoError):
    """A request that can never succeed as it is.

    `param` names the offending request field, as the OpenAI error body wants it.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:  # survives pickling across actors
        return (type(self), (self.message, self.param))


class NotFoundError(RequestError):
    """The request names something that does not exist here."""


class CapacityError(OctavoError):
    """Too much work at present. `retry_after_s` is a hint for the client, in seconds."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.message, self.retry_after_s))


class StepError(OctavoError):
    """A step failed. Its requests end with finish reason "error"; the engine goes on."""


class RankLost(OctavoError):
    """A rank died or stopped answering: the replica cannot go on."""
