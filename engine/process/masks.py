"""The way of token masks to a runner: they come behind the plan that needs them, while its step is computed.

Knows when to wait and how long. Does not know what masks say.
"""

from __future__ import annotations

import queue

from octavo.engine.core.plan import TokenMasks
from octavo.engine.errors import StepError

WAIT_S = 60.0  # for masks, from when a step needs them; they are made in milliseconds


class MaskBox:
    """Masks from another thread of this process. A step that failed may have left its own: they are passed over."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[TokenMasks | None] = queue.SimpleQueue()

    def put(self, masks: TokenMasks) -> None:
        """In the order of the steps."""
        self._queue.put(masks)

    def close(self) -> None:
        """No more masks come: whoever waits fails."""
        self._queue.put(None)

    def take(self, step_id: int) -> TokenMasks:
        while True:
            try:
                masks = self._queue.get(timeout=WAIT_S)
            except queue.Empty:
                raise StepError(f"The masks of step {step_id} have not come within {WAIT_S:g} s.") from None
            if masks is None:
                self._queue.put(None)  # for the next one who asks
                raise StepError("The engine has stopped.")
            if masks.step_id == step_id:
                return masks
            assert masks.step_id < step_id, f"masks of step {masks.step_id}, expected {step_id}"
