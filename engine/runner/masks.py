"""From a plan's token masks, which came as bytes, to what the sampler puts on logits."""

from __future__ import annotations

import numpy as np
import torch

from octavo.engine.core.plan import TokenMasks
from octavo.engine.runner.sampling_state import Ints
from octavo.kernels.sampling import Masks
from octavo.kernels.send import send


def to_masks(masks: TokenMasks, places: Ints, device: torch.device) -> Masks | None:
    """places: [masked rows], where in the batch each of the masks' rows is. None: they all allow everything."""
    given = [i for i, row in enumerate(masks.rows) if row]
    if not given:
        return None
    # bytearray: torch wants memory that could be written to.
    joined = np.frombuffer(bytearray().join(masks.rows), np.int32).reshape(len(given), -1)
    return Masks(places[given], send(joined, device))
