"""Where octavo's log lines go: standard error, which Ray takes to the session's files and to the driver."""

from __future__ import annotations

import logging


def show_logs(level: str) -> None:
    """Show what octavo logs at `level` (debug, info, warning, error) and above. Once per process."""
    logger = logging.getLogger("octavo")
    logger.setLevel(level.upper())
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s: %(message)s"))
        logger.addHandler(handler)
    logger.propagate = False
