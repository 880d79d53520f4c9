"""Makes `fakes` importable: tests run with --import-mode=importlib, which leaves sys.path alone."""

import sys
from pathlib import Path

import grpc.aio

sys.path.insert(0, str(Path(__file__).parent))

# grpc.aio stops its poller thread whenever its last object is collected, and that has been seen to deadlock in the
# garbage collection at pytest's end. One reference that stays keeps the poller alive.
grpc.aio.init_grpc_aio()
