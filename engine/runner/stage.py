"""Stage: a rank's place in the pipeline, as its runner sees it: what a step starts from, and where its result goes.

Knows the pp group and the shape of hidden states. With one stage there is nothing to receive and nobody to send to.
"""

from __future__ import annotations

import torch

from octavo.engine.parallel.mesh import Group


class Stage:
    """width, dtype: of the hidden states that pass between stages."""

    def __init__(self, pp: Group, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._pp, self._width, self._dtype, self._device = pp, width, dtype, device

    @property
    def is_first(self) -> bool:
        return self._pp.is_first

    @property
    def is_last(self) -> bool:
        return self._pp.is_last

    def receive(self, num_tokens: int) -> torch.Tensor:
        """[T, width] from the stage before, whenever it comes. Raises RankLost."""
        hidden = torch.empty(num_tokens, self._width, dtype=self._dtype, device=self._device)
        self._pp.recv(hidden, self._pp.rank - 1)
        return hidden

    def send(self, hidden: torch.Tensor) -> None:
        """To the stage after; does not wait for it. hidden may be overwritten at once. Raises RankLost."""
        self._pp.send(hidden, self._pp.rank + 1)
