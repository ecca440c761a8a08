"""Lock of a place: one writer at a time, in folders and on S3 alike.

The lock is the object ``.lock/<term>.json``. The holder is the one with the highest term; it rewrites its object every
`BEAT_S` seconds, and deletes it at the end. Taking over means to create the next term, which only one caller can
(`Storage.create`). The holder is a job, not a process: a restart of the same job takes the lock at once.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Annotated, Self

from msgspec import Meta

from sharding.errors import UserError
from sharding.schema import decode
from sharding.storage.base import NotFoundError, Storage, StorageUnavailableError, StoredObject
from sharding.storage.local import LocalStorage
from sharding.storage.owner import born, has_ended

logger = logging.getLogger(__name__)

LOCK_FOLDER = ".lock"
BEAT_S = 15.0
"""Seconds between two heartbeats of a holder."""
STALE_S = 60.0
"""Age of a heartbeat from which on the lock may be taken over, by the clock of the store."""
JOB_VARIABLE = "SATFUSION_JOB"
"""Environment variable that names the job of this process, for all its ranks and restarts."""

_NAME = re.compile(r"(\d{6,})\.json")
_CLOCK = f"{LOCK_FOLDER}/clock-"
"""Beginning of the key of an object that tells the time of the store; who finds the lock held writes and removes it."""
_LARGEST = 4096
_ATTEMPTS = 50
_Time = Annotated[float, Meta(ge=0, lt=1e11)]


class LockedError(UserError):
    """Error of a place that another job is writing to."""


class LockLostError(UserError):
    """Error of a lock that another job has taken over, because its holder had stopped for too long."""


@dataclass(frozen=True)
class Holder:
    """Holder of a lock. It holds no secret: everyone who can read the place can read it."""

    job: str
    """Identity of the job: equal for all its processes and restarts."""

    user: str
    """Name of the user who runs it."""

    host: str
    """Name of its machine."""

    pid: Annotated[int, Meta(ge=0, lt=2**31)]
    """Process that wrote the lock."""

    born: str
    """Boot, process namespace and start of that process, by which its end is recognised; empty if unknown."""

    verb: str
    """Command that holds the lock, such as ``shard``."""

    since: _Time
    """Time at which it took the lock, seconds since 1970."""

    beat: _Time
    """Time of its last heartbeat by its own clock, seconds since 1970; it shows only that another one arrived."""

    token: str
    """Random number of this acquisition."""

    @classmethod
    def here(cls, verb: str) -> Holder:
        """Return this process as a holder that begins now."""
        now, pid = time.time(), os.getpid()
        return cls(
            job=_plain(_job()),
            user=_plain(_user()),
            host=_plain(socket.gethostname()),
            pid=pid,
            born=born(pid),
            verb=verb,
            since=now,
            beat=now,
            token=uuid.uuid4().hex,
        )

    @classmethod
    def parse(cls, data: bytes) -> Holder:
        """Parse the bytes of `to_bytes`; ValueError for others."""
        found = decode(data, cls)
        if not all(text.isprintable() for text in vars(found).values() if isinstance(text, str)):
            raise ValueError("control characters")
        return found

    def to_bytes(self) -> bytes:
        """Return the holder as JSON."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    def __str__(self) -> str:
        job = "" if self.job.startswith("process ") else f" ({self.job})"
        return f"`satfusion {self.verb}` of {self.user} on {self.host}, pid {self.pid}{job}, since {_clock(self.since)}"

    def has_ended(self) -> bool:
        """Return True if its process ran on this machine and has ended; False if that is not known."""
        return has_ended(self.pid, self.born)


class Lock:
    """Lock of one place, held within a ``with`` block: ``with Lock(storage, "shard") as lock``."""

    def __init__(self, storage: Storage, verb: str, say: Callable[[str], None] = logger.warning) -> None:
        """Prepare the lock; nothing is written yet.

        Args:
            storage: Place to lock.
            verb: Command of this process, for the messages that others get.
            say: Function that gets a line for the user if the lock is taken over from another job.
        """
        self._storage, self._say = storage, say
        self._holder = Holder.here(verb)
        self._term = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_forever, name="lock", daemon=True)

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            LockedError: Another job holds it; the message names the job.
            UserError: The place cannot be written to.
        """
        for _ in range(_ATTEMPTS):
            terms = self._terms()
            last = self._read(terms[-1]) if terms else None
            if terms and last is None:
                continue  # released since it was listed
            reason = self._reason_to_take(terms[-1], last) if last else ""
            if reason is not None and self._take(terms):
                if reason:
                    self._say(f"{self._storage.uri} was locked by {last}: {reason}, so its lock was taken over")
                self._thread.start()
                if isinstance(self._storage, LocalStorage):
                    self._storage.remove_abandoned()
                return self
        raise LockedError(f"{self._storage.uri} could not be locked, because others try to at once: run this again")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock; an error of the store is logged, since the lock expires by itself."""
        self._stop.set()
        if isinstance(error, StorageUnavailableError):
            return  # waiting once is enough
        self._thread.join()
        try:
            if self._is_held():
                self._storage.delete(_key(self._term))
        except UserError as unreleased:
            logger.warning("the lock of %s was not released: %s", self._storage.uri, unreleased)

    def check(self) -> None:
        """Check that the lock is still held; call it before the result is published.

        Raises:
            LockLostError: Another job has taken the lock.
            UserError: The store does not answer.
        """
        if not self._is_held():
            terms = self._terms()
            other = self._read(terms[-1]) if terms else None
            raise LockLostError(
                f"{self._storage.uri} was taken over by {other or 'another job, which has ended'}, because this process"
                f" had not been heard of for {STALE_S:.0f} s: nothing more was written; run the command again"
            )

    def _reason_to_take(self, term: int, holder: Holder) -> str | None:
        """Return the reason why the lock may be taken over, in words.

        Returns:
            Empty if the same job holds it, None if it was released meanwhile.
        """
        if holder.job == self._holder.job:
            return ""
        if holder.has_ended():
            return "its process has ended"
        age = self._age_of_beat(term)
        if age is not None and age >= STALE_S:
            if holder.host != self._holder.host:  # its file system may tell another time: watch for a heartbeat
                self._stop.wait(BEAT_S + 1)
            now = self._read(term)
            if now == holder:
                return f"its last heartbeat is {age:.0f} s old"
            age = None if now is None else 0.0
        if age is None:
            return None
        until = min(STALE_S, STALE_S - age)
        raise LockedError(
            f"{self._storage.uri} is being written by {holder}: wait until it ends, or name another place; if it was"
            f" killed, this command takes over in {until:.0f} s ({_clock(time.time() + until)})"
        )

    def _age_of_beat(self, term: int) -> float | None:
        """Return the age of the last heartbeat in seconds, by the clock of the store; None if the lock was released.

        The holder's clock and this machine's may be wrong, so both times are the store's.
        """
        clock = f"{_CLOCK}{self._holder.token}"
        self._storage.write(clock, b"now")
        try:
            times = {item.key: item.modified for item in self._listed()}
        finally:
            self._storage.delete(clock)
        if _key(term) not in times or clock not in times:  # a new holder removes all clocks
            return None
        return times[clock] - times[_key(term)]

    def _take(self, terms: Sequence[int]) -> bool:
        """Create the term after ``terms``, the existing ones; return True if that made this process the holder.

        If the term before was deleted meanwhile, or an unknown one appeared, the lock was released or taken in between
        by another: then this attempt does not count.
        """
        term = (terms[-1] if terms else 0) + 1
        if not self._storage.create(_key(term), self._holder.to_bytes()):
            return False
        listed = self._listed()
        others = set(_terms_of(listed)) - {term}
        mine = self._read(term)
        if mine is None or mine.token != self._holder.token:  # a store without conditional writes
            return False
        if others - set(terms) or set(terms[-1:]) - others:
            self._storage.delete(_key(term))
            return False
        self._term = term
        for other in sorted(others):
            self._storage.delete(_key(other))
        for item in listed:
            if item.key.startswith(_CLOCK):  # that of a killed process; one that runs writes it again
                self._storage.delete(item.key)
        return True

    def _is_held(self) -> bool:
        if self._terms()[-1:] != [self._term]:
            return False
        holder = self._read(self._term)
        return holder is not None and holder.token == self._holder.token

    def _beat_forever(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                if not self._is_held():
                    return
                self._storage.write(_key(self._term), replace(self._holder, beat=time.time()).to_bytes())
                if self._terms()[-1:] != [self._term]:  # taken over between the two: the old term must not come back
                    self._storage.delete(_key(self._term))
                    return
            except UserError as error:
                logger.warning("heartbeat not written to %s, will retry: %s", self._storage.uri, error)

    def _listed(self) -> list[StoredObject]:
        return self._storage.list(f"{LOCK_FOLDER}/")

    def _terms(self) -> list[int]:
        return _terms_of(self._listed())

    def _read(self, term: int) -> Holder | None:
        """Return the holder of a term; None if the term is gone."""
        try:
            data = self._storage.read_range(_key(term), 0, _LARGEST)
        except NotFoundError:
            return None
        try:
            return Holder.parse(data)
        except ValueError:
            raise UserError(
                f"{self._storage.uri}/{_key(term)} is no lock that this program wrote: remove it if nobody is writing"
                " there, or name another place"
            ) from None


def _terms_of(listed: Sequence[StoredObject]) -> list[int]:
    names = (item.key.removeprefix(f"{LOCK_FOLDER}/") for item in listed)
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)


def _key(term: int) -> str:
    return f"{LOCK_FOLDER}/{term:06d}.json"


def _job() -> str:
    """Return the identity of this process's job: given, torchrun's, the process group's, else the process itself."""
    environment = os.environ
    if name := environment.get(JOB_VARIABLE):
        return f"job {name}"
    run = environment.get("TORCHELASTIC_RUN_ID", "none")
    if run != "none":
        return f"torchrun {run}"
    if "RANK" in environment and "MASTER_PORT" in environment:
        place = f"{environment.get('MASTER_ADDR', '')}:{environment['MASTER_PORT']}"
        return f"process group {place} on {socket.gethostname()}"
    return f"process {socket.gethostname()} {os.getpid()} {born(os.getpid())}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        return str(os.getuid())


def _plain(text: str) -> str:
    """Return a short text without control characters."""
    return "".join(letter for letter in text if letter.isprintable())[:200]


def _clock(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
