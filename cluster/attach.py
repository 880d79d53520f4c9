"""Joining a Ray cluster that runs elsewhere, for the operator's commands; one sentence where that cannot be."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from octavo.cluster.machine import check_reachable
from octavo.engine.errors import ConfigError

CLIENT = "ray://"
CLUSTER_ID = "/ray.rpc.NodeInfoGcsService/GetClusterId"
PROBE_S = 5.0


@contextmanager
def attached(address: str) -> Iterator[None]:
    """This process as a driver of the cluster at `address`: auto, host:port, or ray://host:10001 from outside of it.

    Raises ConfigError if there is none.
    """
    if address != "auto":
        check_reachable(address.removeprefix(CLIENT))
    import ray

    quiet_ray()
    if address != "auto" and not address.startswith(CLIENT):
        _check_token(address)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"There is no Ray cluster at {address!r}: {_sentence(error)}") from None
    try:
        yield
    finally:
        with suppress(Exception):  # the cluster may be gone by now
            ray.shutdown()


def _check_token(address: str) -> None:
    """Raises ConfigError if the cluster asks for a token and Ray was not told to send one. Ray itself, which takes the
    token along by itself only for `auto`, would try for 20 s and not say why.
    """
    import grpc
    from ray._raylet import AuthenticationMode, get_authentication_mode  # type: ignore[attr-defined]  # compiled

    if get_authentication_mode() == AuthenticationMode.TOKEN:
        return
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(CLUSTER_ID)(b"", timeout=PROBE_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise ConfigError(
                    f"The Ray cluster at {address} asks for a token: set RAY_AUTH_MODE=token, and if it was made on "
                    f"another machine RAY_AUTH_TOKEN to what `ray get-auth-token` prints there."
                ) from None


def quiet_ray() -> None:
    """What Ray and Serve log in a driver is said better by our tables."""
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
