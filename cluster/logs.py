"""Logging of the command and of each rank: our own packages at INFO on stderr, all others at WARNING and up."""

from __future__ import annotations

import logging
import sys

from sharding.terminal import escaped

PACKAGES = ("sharding", "models", "pipeline", "cluster")


class _Formatter(logging.Formatter):
    """Formatter of one line a message; only a traceback has more."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Format the message, escaped."""
        return escaped(super().formatMessage(record))

    def formatException(self, ei: object) -> str:
        """Format a traceback line by line, each escaped."""
        return "\n".join(map(escaped, super().formatException(ei).split("\n")))  # type: ignore[arg-type]


def configure_logging(rank: int = 0) -> None:
    """Log to stderr in a short form; with several ranks only the first at INFO."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    # It logs the traceback of an expired login, whose error becomes one sentence (`sharding/storage/s3/errors.py`).
    logging.getLogger("botocore.credentials").setLevel(logging.ERROR)
    for name in PACKAGES:
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)
