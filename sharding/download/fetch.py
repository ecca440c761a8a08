"""Download of one file from an HTTP server: it resumes, and the file gets its final name only when it is complete.

Bytes go to ``<name>.part``; ``<name>.part.json`` names the version of the file that they belong to. Both stay after
a failure or an interruption, and the next call resumes from them. `sharding.storage.retries` retries failures, as it
does for a store. A message says "Zenodo" or "the mirror": a mirror's address may be private.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import ssl
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, InvalidHeader

from sharding.errors import UserError
from sharding.progress import progress
from sharding.schema import Natural, decode
from sharding.storage import LocalStorage, retries

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0
"""Seconds without a byte after which a request times out."""
KNOWN_S = 300.0
"""Seconds without progress before retries end, for a server that has answered; else `retries.FIRST_CONTACT_S`."""
PROGRESS_BYTES = 1 << 20
"""Bytes that an attempt must add to all earlier ones to count as progress."""
_BLOCK, _MB, _MOST_REDIRECTS = 1 << 20, 10**6, 10
# Zenodo asks programs to identify themselves, and throttles anonymous Python clients.
_USER_AGENT = "satfusion (https://zenodo.org/records/15382551)"
# This module decides retries and redirects. It stores bytes as they arrive, even if the body ends early.
_PLAIN: Mapping[str, Any] = dict(
    retries=False, redirect=False, preload_content=False, decode_content=False, enforce_content_length=False
)
# Retried like any 5xx: the same request may succeed later.
_BUSY_STATUSES = {408, 425, 429}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


@dataclass
class Server:
    """Server of the files below the URL ``origin``; ``query`` ends each file's URL, and messages use ``name``."""

    origin: str
    name: str
    query: str = ""
    answered: bool = False
    """True once it has answered, even with a refusal."""


@dataclass(frozen=True)
class Version:
    """One version of a remote file. Another origin may serve the same content with another ETag."""

    origin: str
    size: Natural
    etag: str | None


class FailedError(Exception):
    """Failure of a request that is worth a retry, after ``asked_s`` seconds if the server asked for a pause."""

    def __init__(self, reason: str, asked_s: float = 0.0) -> None:
        super().__init__(reason)
        self.asked_s = asked_s


def part_path(target: Path) -> Path:
    """Return the path of an incomplete file's bytes."""
    return target.with_name(f"{target.name}.part")


def fetch(server: Server, target: Path, sha256: str) -> None:
    """Download the file named like ``target`` to ``target``, or resume its download. The folder must exist.

    Raises:
        UserError: The server refuses or does not answer, the digest is wrong, the disk is full, or another process
            downloads the same file. The bytes stay, unless the digest is wrong.
    """
    with _explained(target), _locked(target) as file:
        part = _Part(server, target, file)
        part.complete()
        file.flush()
        os.fsync(file.fileno())  # It may fail; then the file must still be a part.
        if (digest := part.digest.hexdigest()) == sha256:
            part.path.replace(target)
        else:
            part.path.unlink()
        part.folder.delete(part.note)
    if digest != sha256:
        raise UserError(
            f"{target.name} from {server.name} has SHA-256 {digest} instead of {sha256}: it was removed; run the same "
            "command again, with another --mirror if it happens again"
        )


class _Part:
    """The received bytes of a file, their digest, and the version that they belong to."""

    def __init__(self, server: Server, target: Path, file: BinaryIO) -> None:
        """Load the part of an earlier call.

        Raises:
            UserError: The part has bytes whose note is missing or damaged: they may be the user's.
        """
        self.server, self.name, self.path, self.file = server, target.name, part_path(target), file
        self.folder, self.note = LocalStorage(target.parent), f"{self.path.name}.json"
        self.version: Version | None = None
        with contextlib.suppress(UserError, ValueError):
            self.version = decode(self.folder.read(self.note), Version)
        self.length = os.fstat(file.fileno()).st_size
        if self.version is None and self.length:
            raise UserError(
                f"{self.path} holds {self.length} bytes that nothing says are of this download: move it away, or "
                "remove it to start from byte 0"
            )
        if self.version is None or self.length > self.version.size:
            self._restart()
        else:
            self.digest = hash_file(file, f"reading {self.path.name}")

    def _restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.length, self.digest = 0, hashlib.sha256()

    def complete(self) -> None:
        """Request the rest of the file until it is complete or retries end."""
        attempts, furthest = retries.Attempts(self.name), self.length
        while self.version is None or self.length < self.version.size:
            try:
                self._receive()
            except FailedError as error:
                # A server that always starts from byte 0 and then fails makes no progress, however much it sends.
                if self.length >= furthest + PROGRESS_BYTES:
                    attempts.progressed()
                    furthest = self.length
                known = self.server.answered
                last = UserError(
                    f"cannot fetch {self.name}: {error}, {attempts.in_a_row + 1} times in a row; check the network"
                    f"{'' if known else ' and --mirror'}, then run the same command again: it resumes from byte "
                    f"{self.length}"
                )
                attempts.pause(last, str(error), KNOWN_S if known else retries.FIRST_CONTACT_S, error.asked_s)

    def _receive(self) -> None:
        """Request the rest once; FailedError if it does not all arrive."""
        headers, known = {"User-Agent": _USER_AGENT}, self.version
        if self.length and known:
            headers["Range"] = f"bytes={self.length}-"
            # A weak ETag must not stand in If-Range; `_accept` compares it.
            if known.etag and known.origin == self.server.origin and not known.etag.startswith("W/"):
                headers["If-Range"] = known.etag
        try:
            with contextlib.closing(_open(self.server, self.name, headers)) as response:
                size = self._accept(response)
                with _meter(f"fetching {self.name}", size, self.length) as count:
                    while chunk := response.read1(_BLOCK):
                        if self.length + len(chunk) > size:
                            raise FailedError("the server sent more bytes than the file has")
                        self.file.write(chunk)
                        self.digest.update(chunk)
                        self.length += len(chunk)
                        count(len(chunk))
                    if self.length < size:
                        raise FailedError("the response ended early")
        except HTTPError as error:
            raise _failure(self.server, error) from error

    def _accept(self, response: urllib3.BaseHTTPResponse) -> int:
        """Decide if a response resumes the part, replaces it or is refused; return the file's size."""
        server, known = self.server, self.version
        start, size = _extent(server, self.name, response)
        version = Version(server.origin, size, response.headers.get("ETag"))
        if start not in (0, self.length):
            raise FailedError(f"{server.name} sends another byte range than the requested one")
        if self.length and known:
            if size != known.size:
                # Not dropped: the response may be an error page, and the part may have taken hours.
                raise UserError(
                    f"{self.name} at {server.name} has {size} bytes now, and {self.path} is part of one of "
                    f"{known.size}: try again later, or remove the part to start from byte 0"
                )
            changed = version.origin == known.origin and version.etag != known.etag
            if changed or start == 0:
                reason = "has another version now" if changed else "does not support byte ranges"
                logger.warning("%s: %s %s; starting from byte 0", self.name, server.name, reason)
                self._restart()
                if start:
                    raise FailedError(f"{server.name} {reason}")
        need, free = size - self.length, shutil.disk_usage(self.path.parent).free
        if need > free:
            missing = f"{free / 1e9:.1f} GB free, and {self.name} needs {need / 1e9:.1f} GB more"
            raise UserError(f"{self.path.parent} has {missing}: free some space, or give another --to")
        if version != known:
            self.folder.write(self.note, json.dumps(asdict(version)).encode())
            self.version = version
        return size


def _open(server: Server, name: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
    """Send a request and follow redirects, but never from https to http or to another scheme."""
    url = f"{server.origin}/{name}{server.query}"
    for _ in range(_MOST_REDIRECTS):
        response = _pool(url).request("GET", url, headers=headers, timeout=TIMEOUT_S, **_PLAIN)
        server.answered = True
        if not (location := response.get_redirect_location()):
            break
        response.close()
        scheme, url = urlsplit(url).scheme, urljoin(url, location)
        allowed = ("https",) if scheme == "https" else ("http", "https")
        if urlsplit(url).scheme not in allowed:
            target = f"a URL that is not {' or '.join(allowed)}"
            raise UserError(f"{server.name} redirects from {scheme} to {target}: use another --mirror")
    return response


def _pool(url: str) -> urllib3.PoolManager:
    """Return a pool that connects to a URL, directly or through the proxy that the environment names for it."""
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return urllib3.PoolManager()
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    login = urllib3.util.parse_url(proxy).auth
    return urllib3.ProxyManager(proxy, proxy_headers=urllib3.make_headers(proxy_basic_auth=login and unquote(login)))


def _extent(server: Server, name: str, response: urllib3.BaseHTTPResponse) -> tuple[int, int]:
    """Return the offset of a response's first byte and the size of the whole file."""
    status, length = response.status, response.headers.get("Content-Length", "")
    if status in _BUSY_STATUSES or status >= 500:
        asked_s = 0.0
        with contextlib.suppress(InvalidHeader):
            asked_s = urllib3.Retry().get_retry_after(response) or 0.0
        raise FailedError(f"{server.name} answers HTTP {status}", asked_s)
    if status == 206:
        if found := re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", "")):
            return int(found[1]), int(found[2])
        raise FailedError(f"{server.name} sends a byte range without a valid Content-Range")
    if status == 200 and length.isdigit():
        return 0, int(length)
    if status == 200:
        raise UserError(f"{server.name} does not say how long {name} is (no Content-Length): use another --mirror")
    if status == 416:
        advice = f"remove {name}.part to start from byte 0"
        raise UserError(f"{name} at {server.name} is shorter now than its part (HTTP 416): {advice}")
    advice = "try again later, or name a --mirror that serves it"
    raise UserError(f"{server.name} refuses {name} (HTTP {status}): {advice}")


def _failure(server: Server, error: HTTPError) -> Exception:
    """Convert a connection error: use the operating system's error inside urllib3's."""
    reason: BaseException | None = error
    while reason and not isinstance(reason, OSError):
        reason = reason.__cause__ or reason.__context__
    if isinstance(reason, ssl.SSLCertVerificationError):
        return UserError(
            f"the certificate of {server.name} cannot be trusted ({reason.verify_message}): set SSL_CERT_FILE to the "
            "certificates of your network, or use another --mirror"
        )
    if isinstance(reason, TimeoutError):
        return FailedError(f"{server.name} sent nothing for {TIMEOUT_S:g} s")
    words = getattr(reason, "strerror", None) or type(reason or error).__name__
    return FailedError(f"the connection to {server.name} failed ({words})")


def hash_file(file: BinaryIO, label: str) -> hashlib._Hash:
    """Return the SHA-256 of a file from its current position to its end; show progress."""
    digest = hashlib.sha256()
    with _meter(label, os.fstat(file.fileno()).st_size, 0) as count:
        while block := file.read(_BLOCK):
            digest.update(block)
            count(len(block))
    return digest


@contextlib.contextmanager
def _meter(label: str, size: int, done: int) -> Iterator[Callable[[int], None]]:
    """Show progress in whole megabytes; yield a function that adds bytes."""
    with progress(-(-size // _MB), label, "MB", initial=-(-done // _MB)) as shown:

        def count(length: int) -> None:
            nonlocal done
            before, done = done, done + length
            if more := -(-done // _MB) - -(-before // _MB):
                shown.update(more)

        yield count


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[BinaryIO]:
    """Open a file's part and lock it for this process; create it if it does not exist."""
    path = part_path(target)
    busy = UserError(f"another download is writing {target}: wait until it ends, then run the same command again")
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=_BLOCK) as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning("the file system of %s has no locks: run one download at a time into it", target.parent)
        # The process that held the lock before may have renamed or removed the part since it was opened here.
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise busy
        if target.exists():
            path.unlink()
            raise busy
        yield file


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Convert errors of the local disk to a UserError. Connection errors are not `OSError` here."""
    try:
        yield
    except OSError as error:
        reason = f"{part_path(target)} ({error.strerror or type(error).__name__})"
        if error.errno in _NO_SPACE:
            advice = "free some and run the same command again; the bytes so far are kept"
            raise UserError(f"no space left for {reason}: {advice}") from error
        raise UserError(f"cannot write {reason}: check --to and its permissions") from error
