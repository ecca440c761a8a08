"""Retry policy of storage and download: number of attempts, time limit, back-off pauses; and a count of retries."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import Counter

# A dead endpoint must be reported within 20 s: attempts begin only in the first 10 s, and a connection times out
# after 5 s. A store that has answered this process before exists, and its restart may take a minute.
FIRST_CONTACT_S = 10.0
KNOWN_S = 120.0
# With an endpoint that accepts the connection and stays silent, one attempt takes longer than the first contact may.
LEAST_ATTEMPTS = 2
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 8.0
# A server may ask for longer pauses (Retry-After). Only this much of each counts against the time limit: otherwise
# one long pause would be the last.
LONGEST_ASKED_S = 600.0
ASKED_COUNTS_S = 30.0
# Single failures are normal for an object store; only lasting ones are logged as warnings.
QUIET_S = 5.0
# Not the global `random`, which others seed: a failure of the store must not change their numbers.
_JITTER = random.SystemRandom()

logger = logging.getLogger(__name__)

GIVE_UP = threading.Event()
"""Set when this process was told to end at once: the next failure of any call is then final."""


class RetryCounter:
    """Counter of retried requests and resumed bodies, by reason. Safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, reason: str) -> None:
        """Count one retry."""
        with self._lock:
            self._counts[reason] += 1

    @property
    def total(self) -> int:
        """Total number of retries."""
        with self._lock:
            return self._counts.total()

    def by_reason(self) -> dict[str, int]:
        """Return the counts by S3 error code or kind of failure: ``{"SlowDown": 3, "ReadTimeoutError": 1}``."""
        with self._lock:
            return dict(self._counts)


class Outages:
    """Outages of endpoints, shared by all threads of this process, so that each outage is waited for once.

    An outage begins with the first failure after a success, whichever call met it.
    """

    def __init__(self) -> None:
        # Times of the first and the last failure. Single operations on a dict need no lock, which a fork would copy.
        self._times: dict[str, tuple[float, float]] = {}

    def failed(self, endpoint: str) -> float:
        """Note a failure, and return the time (`time.monotonic`) at which its outage began."""
        now = time.monotonic()
        first, last = self._times.get(endpoint, (now, now))
        if now - last > KNOWN_S:  # nobody asked for so long: the store may have worked in between
            first = now
        self._times[endpoint] = first, now
        return first

    def ended(self, endpoint: str) -> float:
        """Note a success, and return the seconds that the outage before it took; 0 without one."""
        first, _ = self._times.pop(endpoint, (math.inf, 0.0))
        return max(0.0, time.monotonic() - first)


class Attempts:
    """Attempts of one call: it backs off with growing pauses and full jitter, until the time limit.

    The last attempt begins at the time limit at the latest, so a call may take one attempt longer than the limit.
    """

    def __init__(self, what: str, stop: threading.Event | None = None) -> None:
        """Start the clock of the first attempt.

        Args:
            what: Name of the object in the log.
            stop: Event that ends a pause early; the next failure is then final.
        """
        self.failures = 0
        """Number of failed attempts that were retried."""
        self.in_a_row = 0
        """Number of failed attempts since the last progress."""

        self._what = what
        self._stop = stop or GIVE_UP
        self.progressed()

    def progressed(self) -> None:
        """Restart the time limit and the pauses: the store is not failing while a body keeps arriving."""
        self.in_a_row = 0
        self._since = time.monotonic()

    def pause(
        self, error: Exception, reason: str, patience_s: float, asked_s: float = 0.0, since: float = math.inf
    ) -> None:
        """Wait before the next attempt.

        Args:
            error: Failure of the last attempt.
            reason: The failure in a word for the log, without endpoint or key.
            patience_s: Seconds from the first attempt, or from the last progress, in which another may begin.
            asked_s: Seconds of pause that the server asks for; at most ``LONGEST_ASKED_S`` are waited.
            since: Time (`time.monotonic`) from which the seconds count, if it is earlier: when the outage began.

        Raises:
            Exception: ``error``, at the time limit.
        """
        self.in_a_row += 1
        waited = time.monotonic() - min(self._since, since)
        enough = waited >= patience_s and self.in_a_row >= LEAST_ATTEMPTS
        if enough or self._stop.is_set() or GIVE_UP.is_set():
            raise error
        longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self.in_a_row - 1, 30))
        # Full jitter: many readers that failed together must not retry together.
        seconds = min(_JITTER.uniform(0, longest), max(0.0, patience_s - waited))
        asked_s = min(asked_s, LONGEST_ASKED_S)
        if asked_s > seconds:
            seconds = asked_s
            self._since += max(0.0, asked_s - ASKED_COUNTS_S)
        level = logging.INFO if waited < QUIET_S else logging.WARNING
        attempt = f"attempt {self.failures + 2} follows in {seconds:.1f} s"
        logger.log(level, "%s: %s; %s; waited %.0f s of %.0f s", self._what, reason, attempt, waited, patience_s)
        self.failures += 1
        self._stop.wait(seconds)
