"""A real HTTP server of files that fails in the ways that servers and networks do."""

from __future__ import annotations

import contextlib
import http.server
import re
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 1 << 16


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request."""

    status: int = 0
    """Answered in place of the file, where it is not 0."""

    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with that status."""

    after: int | None = None
    """Bytes of the body before it breaks off; None: it is whole."""

    how: str = "cut"
    """How it breaks off: ``cut``, ``reset``, or ``stall`` until the server ends."""


@dataclass
class Request:
    """One request as it came, and what was sent."""

    path: str
    range: str | None
    if_range: str | None
    agent: str | None
    login: str | None
    """For a proxy."""
    status: int = 0
    sent: int = 0
    """Bytes of the body."""


class Mirror:
    """Files by name; `faults` are used up, one a request, and then all goes well."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.etags: dict[str, str] = {}
        """Sent as they stand."""
        self.ranges = True
        self.check_if_range = True
        self.lengths: dict[str, str | None] = {}
        """Said in place of the true Content-Length; None: none is said."""
        self.gate = threading.Event()
        """Bodies wait while it is clear."""
        self.gate.set()
        self.faults: deque[Fault] = deque()
        self.requests: list[Request] = []
        self.ended = threading.Event()
        self.url = ""

    def ranges_asked(self) -> list[str | None]:
        return [request.range for request in self.requests]

    @property
    def sent(self) -> int:
        return sum(request.sent for request in self.requests)


@contextlib.contextmanager
def serving(mirror: Mirror, certificate: Path | None = None) -> Iterator[Mirror]:
    """Serve on loopback, over TLS with a file of key and certificate, until the block ends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _answer(self, mirror)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    scheme = "http"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        # The handshake takes place in the request's thread, where a client that breaks it off disturbs nobody.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        scheme = "https"
    server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
    mirror.url = f"{scheme}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield mirror
    finally:
        mirror.ended.set()
        mirror.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _answer(handler: http.server.BaseHTTPRequestHandler, mirror: Mirror) -> None:
    name = handler.path.partition("?")[0].lstrip("/")
    asked, if_range = handler.headers.get("Range"), handler.headers.get("If-Range")
    agent, login = handler.headers.get("User-Agent"), handler.headers.get("Proxy-Authorization")
    request = Request(handler.path, asked, if_range, agent, login)
    mirror.requests.append(request)
    fault = mirror.faults.popleft() if mirror.faults else Fault()
    if fault.status or name not in mirror.files:
        request.status = fault.status or 404
        handler.send_response(request.status)
        for header, value in {"Content-Length": "0", **fault.headers}.items():
            handler.send_header(header, value)
        handler.end_headers()
        return
    body, etag, start = mirror.files[name], mirror.etags.get(name), 0
    found = re.fullmatch(r"bytes=(\d+)-", asked or "")
    if found and mirror.ranges and not (mirror.check_if_range and if_range not in (None, etag)):
        start = int(found[1])
    if start >= len(body) > 0:
        request.status = 416
        handler.send_response(416)
        handler.end_headers()
        return
    request.status = 206 if start else 200
    handler.send_response(request.status)
    length = mirror.lengths.get(name, str(len(body) - start))
    if length is not None:
        handler.send_header("Content-Length", length)
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
    if etag is not None:
        handler.send_header("ETag", etag)
    handler.end_headers()
    _send(handler, mirror, request, fault, body[start:])


def _send(
    handler: http.server.BaseHTTPRequestHandler, mirror: Mirror, request: Request, fault: Fault, body: bytes
) -> None:
    rest = memoryview(body)[: fault.after]
    mirror.gate.wait()
    with contextlib.suppress(ConnectionError):
        while rest:
            request.sent += len(rest[:BLOCK])  # first, because who has received them may look at once
            handler.wfile.write(rest[:BLOCK])
            rest = rest[BLOCK:]
    if fault.after is None:
        return
    if fault.how == "stall":
        mirror.ended.wait()
    if fault.how == "reset":
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
