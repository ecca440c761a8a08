"""Progress of long work: a bar on a terminal, else a log line every few seconds."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Protocol, Self

from tqdm import tqdm

LOG_EVERY_S = 15.0

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Context manager that counts finished work."""

    def __enter__(self) -> Self:
        """Start the clock."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show the result."""
        ...

    def update(self, n: int = 1, **fields: object) -> None:
        """Add ``n`` finished units; show ``fields`` (such as ``loss=0.1``) beside the rate."""
        ...


def progress(
    total: int, label: str, unit: str, *, initial: int = 0, every_s: float = LOG_EVERY_S, shown: bool = True
) -> Progress:
    """Show work of ``total`` units with its rate and the time left.

    Args:
        total: Units of work.
        label: Name of the work, such as ``"sharding"``.
        unit: Name of one unit, such as ``"AOI"``.
        initial: Units that were finished before; the rate does not count them.
        every_s: Seconds between log lines, if standard error is not a terminal.
        shown: False to show nothing, in all processes of a group but one.

    Returns:
        A context manager; call its ``update(n, **fields)`` when units are finished.
    """
    if not shown:
        return _Nothing()
    if sys.stderr.isatty():
        return _Bar(total, label, unit, initial)
    return _Lines(total, label, unit, initial, every_s)


class _Nothing:
    """Progress that is not shown."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def update(self, n: int = 1, **fields: object) -> None:
        pass


class _Bar:
    """Progress as a tqdm bar."""

    def __init__(self, total: int, label: str, unit: str, initial: int) -> None:
        self._bar = tqdm(total=total, desc=label, unit=f" {unit}", initial=initial, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, n: int = 1, **fields: object) -> None:
        if fields:
            self._bar.set_postfix(fields, refresh=False)
        self._bar.update(n)


class _Lines:
    """Progress as log lines: at most one every few seconds, and one at the end."""

    def __init__(self, total: int, label: str, unit: str, initial: int, every_s: float) -> None:
        self._total, self._label, self._unit, self._every_s = total, label, unit, every_s
        self._done = self._initial = initial
        self._fields: dict[str, object] = {}
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Self:
        self._start = self._last = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log("stopped after" if error is not None else "finished in")

    def update(self, n: int = 1, **fields: object) -> None:
        self._done += n
        self._initial = min(self._initial, self._done)  # work may be undone
        self._fields = fields
        if time.monotonic() - self._last >= self._every_s:
            self._last = time.monotonic()
            self._log(None)

    def _log(self, end: str | None) -> None:
        """Log one line; ``end`` is the outcome of the work, or None while it runs."""
        seconds = time.monotonic() - self._start
        rate = (self._done - self._initial) / seconds if seconds > 0 else 0.0
        if end is None:
            left = tqdm.format_interval((self._total - self._done) / rate) if rate > 0 else "?"
            when = f"{left} left"
        else:
            when = f"{end} {tqdm.format_interval(seconds)}"
        fields = "".join(f", {name}={value}" for name, value in self._fields.items())
        logger.info(
            "%s: %d/%d %s, %.3g %s/s, %s%s",
            self._label, self._done, self._total, self._unit, rate, self._unit, when, fields,
        )  # fmt: skip
