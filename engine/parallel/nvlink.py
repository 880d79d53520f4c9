"""Which GPUs of this node NVLink connects, as the driver's management library (NVML) says.

By UUID, since a process may see its own GPU alone, and every process' first GPU has the number 0. Source: nvml.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

_P2P_NVLINK = 2  # NVML_P2P_CAPS_INDEX_NVLINK
_OK = 0  # NVML_SUCCESS, and NVML_P2P_STATUS_OK

NVLinked = Callable[[str, Sequence[str]], str]


def nvlink_obstacle(gpu: str, others: Sequence[str]) -> str:
    """Why NVLink does not lead from one GPU to all the others, directly or by switches; "" = it does. GPUs by UUID."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "the driver's management library (libnvidia-ml) is not here to say which GPUs are connected"
    if nvml.nvmlInit_v2() != _OK:
        return "the driver's management library (libnvidia-ml) does not answer"
    try:
        mine = _handle(nvml, gpu)
        theirs = [_handle(nvml, other) for other in others]
        if mine is None or None in theirs:
            return "a GPU is not known by its UUID (a part of one, perhaps, or hidden from this container)"
        for other, handle in zip(others, theirs, strict=True):
            status = ctypes.c_int(-1)
            code = nvml.nvmlDeviceGetP2PStatus(mine, handle, ctypes.c_int(_P2P_NVLINK), ctypes.byref(status))
            if code != _OK or status.value != _OK:
                return f"NVLink does not connect {gpu} and {other}"
        return ""
    finally:
        nvml.nvmlShutdown()


def _handle(nvml: ctypes.CDLL, uuid: str) -> ctypes.c_void_p | None:
    handle = ctypes.c_void_p()
    code = nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle))
    return handle if code == _OK else None
