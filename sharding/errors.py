"""Errors that are not bugs: the user can correct the cause, or an AOI cannot become a sample."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal

Reason = Literal[
    "missing-file",
    "too-few-revisits",
    "listed-twice",
    "unsafe-path",
    "absurd-size",
    "damaged-member",
    "unreadable",
    "wrong-bands",
    "wrong-type",
    "no-georeference",
    "no-overlap",
    "wrong-ratio",
    "size-mismatch",
    "not-finite",
    "no-data",
    "implausible",
    "degenerate",
    "too-cloudy",
    "no-date",
    "disagrees",
]
"""Reason why an AOI is skipped, in the order of the checks."""


class UserError(Exception):
    """Error of the user's input. The message is one sentence that names the file or option, the value and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """


class UnusableError(Exception):
    """Error of an AOI that cannot become a sample.

    Attributes:
        reason: Short code for the index.
        detail: The finding, in words.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that it can be pickled by a worker process
        self.reason: Reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class RevisitError(UnusableError):
    """Error of one revisit; the AOI is usable if enough others remain.

    Attributes:
        number: The revisit's number in the source.
    """

    def __init__(self, reason: Reason, detail: str, number: int) -> None:
        super().__init__(reason, detail)
        self.args = (reason, detail, number)
        self.number = number


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest of ``known``, else the list of all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"
