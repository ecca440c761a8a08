"""Files at an HTTP server, from any byte on: one request, and what its answer means.

A message of this module names the file and says "Zenodo" or "the mirror": a mirror's address may be private.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from typing import IO, cast
from urllib.parse import urlsplit

from sharding.errors import UserError

CHUNK = 1 << 18
"""Most bytes that are read at once; a TLS connection gives less."""
_USER_AGENT = "satfusion (https://zenodo.org/records/15382551)"
"""Zenodo asks programs to say who they are; an anonymous Python client is held back."""
_BUSY_STATUSES = {408, 425, 429}
"""The same request may succeed later; so may one answered with any 5xx."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


class BrokenError(Exception):
    """The server did not give what was asked for, but may at the next request.

    Attributes:
        retry_after_s: seconds that the server asks to wait, 0 where it does not say.
    """

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Version:
    """What tells one content of a remote file from another."""

    origin: str
    """The folder at the server; another one may serve the same content under another ETag."""

    size: int
    """Bytes."""

    etag: str | None
    """The server's name for the content, if it has one."""


@dataclass(frozen=True)
class Answer:
    """A body on its way."""

    start: int
    """The byte of the file that it begins with: 0 where the server ignores ranges, or the file has changed."""

    version: Version
    """Of the file that it comes from."""

    chunks: Iterator[bytes]
    """The body; it may end early. Raises BrokenError where the connection fails or stalls."""


class Server:
    """Files below one ``http(s)://`` folder."""

    def __init__(self, origin: str, name: str, *, query: str = "", timeout_s: float) -> None:
        """Nothing is sent yet.

        Args:
            origin: the folder's URL.
            name: what messages call the server, such as ``"the mirror"``.
            query: added to each URL, such as ``"?download=1"``.
            timeout_s: seconds without a byte after which a request has failed.
        """
        self.name = name
        self.answered = False
        """Whether the server has ever answered, if only with a refusal."""
        self._origin, self._query, self._timeout_s = origin, query, timeout_s
        # Proxies come from the environment, and certificates are verified: urllib's defaults.
        self._opener = urllib.request.build_opener(_SafeRedirects(name))

    @contextlib.contextmanager
    def open(self, file: str, offset: int, known: Version | None) -> Iterator[Answer]:
        """Ask for a file from byte ``offset`` on.

        Args:
            file: its name in the folder.
            offset: bytes that are here already.
            known: the version that these come from; where the server has another one now, it sends that from byte 0.

        Raises:
            BrokenError: where the server does not answer or is busy.
            UserError: where it refuses, or cannot be trusted.
        """
        headers = {"User-Agent": _USER_AGENT}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            # A weak ETag must not stand in If-Range; the caller compares it instead.
            if known and known.etag and known.origin == self._origin and not known.etag.startswith("W/"):
                headers["If-Range"] = known.etag
        request = urllib.request.Request(f"{self._origin}/{file}{self._query}", headers=headers)
        try:
            response = cast(http.client.HTTPResponse, self._opener.open(request, timeout=self._timeout_s))
        except urllib.error.HTTPError as error:
            self.answered = True
            with error:
                raise self._refusal(file, error) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(error) from error
        with response:
            self.answered = True
            start, size = self._extent(file, response)
            version = Version(self._origin, size, response.headers.get("ETag"))
            yield Answer(start, version, self._chunks(response))

    def _chunks(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        try:
            while chunk := response.read1(CHUNK):
                yield chunk
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(error) from error

    def _extent(self, file: str, response: http.client.HTTPResponse) -> tuple[int, int]:
        """Return the first byte that an answer holds and the whole file's size."""
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            if found := _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "")):
                return int(found[1]), int(found[2])
            raise BrokenError(f"{self.name} sends a part and does not say which")
        length = response.headers.get("Content-Length", "")
        if response.status != http.HTTPStatus.OK or not length.isdigit():
            raise UserError(
                f"{self.name} does not say how long {file} is (HTTP {response.status}, no Content-Length): use another "
                "--mirror"
            )
        return 0, int(length)

    def _refusal(self, file: str, error: urllib.error.HTTPError) -> Exception:
        """Explain an HTTP status that is no success."""
        if error.code in _BUSY_STATUSES or error.code >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
            return BrokenError(f"{self.name} answers HTTP {error.code}", _seconds(error.headers.get("Retry-After")))
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return UserError(
                f"{file} at {self.name} is shorter now than what was fetched of it (HTTP 416): remove {file}.part to "
                "begin anew"
            )
        return UserError(
            f"{self.name} refuses {file} (HTTP {error.code}): try again later, or name a --mirror that serves it"
        )

    def _failure(self, error: Exception) -> Exception:
        """Explain a connection that failed."""
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            return UserError(
                f"the certificate of {self.name} cannot be trusted ({reason.verify_message}): set SSL_CERT_FILE to the "
                "certificates of your network, or use another --mirror"
            )
        if isinstance(reason, TimeoutError):
            return BrokenError(f"{self.name} sent nothing for {self._timeout_s:g} s")
        words = getattr(reason, "strerror", None) or type(reason).__name__
        return BrokenError(f"the connection to {self.name} failed ({words})")


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to anything else, and only to http or https."""

    def __init__(self, server: str) -> None:
        self._server = server

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        """Return the next request; UserError where it would be less safe."""
        allowed = {"https"} if req.type == "https" else {"http", "https"}
        if urlsplit(newurl).scheme not in allowed:
            raise UserError(
                f"{self._server} redirects from {req.type} to a URL that is not {' or '.join(sorted(allowed))}: "
                "use another --mirror"
            )
        return super().redirect_request(req, fp, code, msg, cast(http.client.HTTPMessage, headers), newurl)


def _seconds(retry_after: str | None) -> float:
    """Return the seconds that a Retry-After header asks for, as a number or a date; 0 where it says nothing."""
    if not retry_after:
        return 0.0
    if retry_after.isdigit():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0
