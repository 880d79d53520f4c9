"""From a plan's token masks, which came as bytes, to what the sampler puts on logits."""

from __future__ import annotations

import numpy as np
import torch

from octavo.engine.core.plan import TokenMasks
from octavo.engine.runner.sampling_state import Ints
from octavo.kernels.sampling import Masks


def to_masks(masks: TokenMasks, places: Ints, device: torch.device) -> Masks | None:
    """places: [masked rows], where in the batch each of the masks' rows is. None: they all allow everything."""
    given = [i for i, row in enumerate(masks.rows) if row]
    if not given:
        return None
    # bytearray: torch wants memory that could be written to.
    joined = np.frombuffer(bytearray().join(masks.rows), np.int32).reshape(len(given), -1)
    bits = torch.from_numpy(joined)
    if device.type == "cuda":
        bits = bits.pin_memory().to(device, non_blocking=True)
    return Masks(places[given], bits)
