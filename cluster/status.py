"""`octavo status`: what runs, how loaded it is, what failed last. No Ray until the command runs."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from octavo.cluster.attach import attached
from octavo.engine.errors import ConfigError

if TYPE_CHECKING:
    from octavo.cluster.overview import Overview

APP = "octavo"
SAMPLE_S = 1.0  # between the two samples of which tokens/s are the difference


def status(
    address: Annotated[
        str, typer.Option(help="Ray cluster: auto, host:port, or ray://host:10001 from outside.")
    ] = "auto",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep showing it until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks of --watch.", min=0.5)] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print it for machines.")] = False,
) -> None:
    """Show what runs: replicas, ranks, queues, KV, prefix hits, tokens/s, the last failures.

    Needs neither the dashboard nor Serve's controller. Exit code 0: all is well; 1: it is not; 2: there is no cluster.
    """
    waiting = Console(stderr=True)
    try:
        with waiting.status("connecting to Ray") as spinner, attached(address):
            from octavo.cluster.overview import look

            spinner.update("asking Serve and every replica")
            first = look(APP)
            if watch:
                spinner.stop()
                _watch(first, interval)
                return
            spinner.update("taking a second sample")
            time.sleep(SAMPLE_S)
            overview = look(APP, first)
    except ConfigError as error:
        sys.stderr.write(f"octavo: {error}\n")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if as_json:
        sys.stdout.write(to_json(overview) + "\n")
    else:
        from octavo.cluster.overview_table import render

        Console(highlight=False).print(render(overview))
    raise typer.Exit(0 if overview.is_well else 1)


def to_json(overview: Overview) -> str:
    stats = overview.stats
    whole = {**dataclasses.asdict(overview), "is_well": overview.is_well, "totals": dataclasses.asdict(stats)}
    return json.dumps(whole, indent=2)


def _watch(overview: Overview, interval: float) -> None:
    """A live table until Ctrl-C. Whatever goes wrong is shown, and looked at again."""
    from rich.live import Live

    from octavo.cluster.overview import look
    from octavo.cluster.overview_table import render

    # A KeyboardInterrupt in the midst of a call into Ray can get lost there. A second Ctrl-C is Python's again.
    stop = threading.Event()

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop.set()

    signal.signal(signal.SIGINT, ask_to_stop)
    with Live(render(overview), console=Console(highlight=False), auto_refresh=False, screen=False) as live:
        live.refresh()
        while not stop.wait(interval):
            trouble = None
            try:
                overview = look(APP, overview)
            except Exception as error:
                trouble = f"Ray does not answer ({type(error).__name__}); what follows is old."
            live.update(render(overview, trouble), refresh=True)
