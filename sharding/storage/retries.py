"""The one retry policy of storage and download: how often, how long, after which pauses; and a count of retries."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter

# A dead endpoint must be reported within 20 s: attempts begin in the first 10 s only, and a connection is given up
# after 5 s. A store that has answered this process before is known to be there, and a restart of one takes a minute.
FIRST_CONTACT_S = 10.0
KNOWN_S = 120.0
# One that takes the connection and then says nothing uses up more than the first contact's time with one attempt.
LEAST_ATTEMPTS = 2
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 8.0
# A server may ask for longer pauses (Retry-After). Of each, only so much counts as lost patience: else one long pause
# would be the last.
LONGEST_ASKED_S = 600.0
ASKED_COUNTS_S = 30.0
# Single failures are daily life of an object store; a person should see those that last.
QUIET_S = 5.0
# Not the `random` that others seed: a failure of the store must not change what they draw.
_JITTER = random.SystemRandom()

log = logging.getLogger(__name__)


class RetryCounter:
    """Counts how often a request was sent again, or a body continued, by reason. Safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, reason: str) -> None:
        """Count one."""
        with self._lock:
            self._counts[reason] += 1

    @property
    def total(self) -> int:
        """All of them."""
        with self._lock:
            return self._counts.total()

    def by_reason(self) -> dict[str, int]:
        """Return the counts by S3 error code or kind of failure: ``{"SlowDown": 3, "ReadTimeoutError": 1}``."""
        with self._lock:
            return dict(self._counts)


class Attempts:
    """The attempts of one call: pauses that grow, with full jitter, until patience ends.

    The last attempt begins at the latest when patience ends, so a call may last that long and one attempt more.
    """

    def __init__(self, what: str, stop: threading.Event | None = None) -> None:
        """Begin the first attempt.

        Args:
            what: names the object in the log.
            stop: ends a pause early; the next failure is then the last.
        """
        self.failures = 0
        """Attempts that failed and were followed by another."""
        self.in_a_row = 0
        """Attempts that failed since the last progress."""

        self._what = what
        self._stop = stop or threading.Event()
        self.progressed()

    def progressed(self) -> None:
        """Restart patience and pauses: a body that keeps arriving is no failing store."""
        self.in_a_row = 0
        self._since = time.monotonic()

    def pause(self, error: Exception, reason: str, patience_s: float, asked_s: float = 0.0) -> None:
        """Wait before the next attempt.

        Args:
            error: why the last one failed.
            reason: the same in a word, without endpoint or key, for the log.
            patience_s: seconds from the first attempt, or from the last progress, in which another may begin.
            asked_s: seconds that the server asks to wait, at most ``LONGEST_ASKED_S`` of which are waited.

        Raises:
            Exception: ``error``, when patience ends.
        """
        self.in_a_row += 1
        waited = time.monotonic() - self._since
        enough = waited >= patience_s and self.in_a_row >= LEAST_ATTEMPTS
        if enough or self._stop.is_set():
            raise error
        longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self.in_a_row - 1, 30))
        # Full jitter: many readers that were turned away together must not come back together.
        seconds = min(_JITTER.uniform(0, longest), max(0.0, patience_s - waited))
        asked_s = min(asked_s, LONGEST_ASKED_S)
        if asked_s > seconds:
            seconds = asked_s
            self._since += max(0.0, asked_s - ASKED_COUNTS_S)
        level = logging.INFO if waited < QUIET_S else logging.WARNING
        log.log(level, "%s: %s; attempt %d follows in %.1f s", self._what, reason, self.failures + 2, seconds)
        self.failures += 1
        self._stop.wait(seconds)
