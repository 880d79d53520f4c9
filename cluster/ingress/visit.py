"""One request on its way through an ingress, whatever brought it: who it is, where it stands, how long it may take.

Knows no transport. HTTP's gate and gRPC's calls make a Visit; what carries the request out takes a place and writes
into the visit's record what came of it.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from octavo.cluster.ingress.errors import TimedOut
from octavo.cluster.ingress.presence import ClientGone
from octavo.cluster.observability.access_log import AccessRecord
from octavo.cluster.observability.traces import NO_TRACE, Generated, Trace
from octavo.engine.errors import CapacityError

_REQUEST_ID = re.compile(r"[!-~]{1,128}")  # printable ASCII without blanks: fit for a header and a log line


@dataclass(slots=True)
class Visit:
    """`headers`: HTTP's or gRPC's metadata, names in lower case. `session_id`: where the request itself says so."""

    request_id: str
    arrival_time: float  # monotonic seconds
    headers: Mapping[str, str] = field(default_factory=dict)
    session_id: str | None = None
    record: AccessRecord = field(default_factory=AccessRecord)
    trace: Trace = NO_TRACE  # of a request that generates or pools

    @asynccontextmanager
    async def time_limit(self, timeout_s: float | None) -> AsyncIterator[None]:
        """Raises TimedOut once the visit is older than `timeout_s`."""
        left = None if timeout_s is None else self.arrival_time + timeout_s - time.monotonic()
        try:
            async with asyncio.timeout(left):
                yield
        except TimeoutError:
            raise TimedOut(f"The request took longer than the {timeout_s:g} s allowed.") from None

    @contextmanager
    def recorded(self, generation: Generated) -> Iterator[None]:
        """Writes into the access record and the trace, at the end, what came of the generation."""
        record = self.record
        try:
            yield
            record.outcome = generation.finish_reasons[-1]
        except ClientGone as error:
            record.outcome = "client gone"
            self.trace.failed(error)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            record.outcome = "cancelled"
            raise
        except Exception as error:
            record.outcome = type(error).__name__
            self.trace.failed(error)
            raise
        finally:
            record.prompt_tokens = generation.num_prompt_tokens
            record.completion_tokens = generation.num_completion_tokens
            record.ttft_s = generation.ttft_s
            self.trace.generated(generation)


class Places:
    """The requests in progress here, of which there may be so many."""

    def __init__(self, limit: int | None) -> None:
        self.ongoing = 0
        self._limit = limit

    def check(self) -> None:
        """Raises CapacityError if none is free."""
        if self._limit is not None and self.ongoing >= self._limit:
            raise CapacityError(f"The server is busy with {self.ongoing} requests; try again later.")

    @contextmanager
    def taken(self) -> Iterator[None]:
        self.check()
        self.ongoing += 1
        try:
            yield
        finally:
            self.ongoing -= 1


def request_id(given: str | None) -> str:
    """The id that a client gave, if it is fit for a header and a log line; else a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
