"""Whether the client is still there: `async with stay(receive): …` is left with ClientGone as soon as it hangs up."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType

from starlette.types import Receive


class ClientGone(Exception):
    """The client has closed the connection: nobody is left to answer."""


class stay:  # reads as the verb it is, like asyncio.timeout
    """Cancels the task inside when the client disconnects, and turns that cancellation into ClientGone.

    To be entered after the request body has been read, in the task that does the work; while inside, nobody else may
    call `receive`. A cancellation from elsewhere passes through.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._watcher = asyncio.create_task(self._watch())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.cancel()
        if not self._gone:
            return
        others = self._task.uncancel() > self._cancelling
        if kind is None:
            # The work ended in the very moment the client left: the cancellation is still to be delivered.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        if not others and (kind is None or kind is asyncio.CancelledError):
            raise ClientGone from error

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._task.cancel()
