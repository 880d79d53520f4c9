"""Joining a Ray cluster that runs elsewhere, for the operator's commands; one sentence where that cannot be."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from octavo.cluster.machine import check_reachable
from octavo.engine.errors import ConfigError

CLIENT = "ray://"


@contextmanager
def attached(address: str) -> Iterator[None]:
    """This process as a driver of the cluster at `address`: auto, host:port, or ray://host:10001 from outside of it.

    Raises ConfigError if there is none.
    """
    if address != "auto":
        check_reachable(address.removeprefix(CLIENT))
    import ray

    quiet_ray()
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"There is no Ray cluster at {address!r}: {_sentence(error)}") from None
    try:
        yield
    finally:
        with suppress(Exception):  # the cluster may be gone by now
            ray.shutdown()


def quiet_ray() -> None:
    """What Ray and Serve log in a driver is said better by our tables."""
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
