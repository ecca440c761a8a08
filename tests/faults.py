"""An HTTP proxy in front of a real S3 server that does to requests and answers what networks and busy stores do."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self, cast
from urllib.parse import urlsplit

from sharding.storage import retries

if TYPE_CHECKING:  # benchmarks use the proxy, too
    import pytest

_PIECE = 16 << 10
_REFUSALS = {"busy": (503, "SlowDown"), "unknown": (501, "NotImplemented")}
# Of one connection, not to be passed on. Host is passed on as it is: the client's signature covers it.
_HOP_BY_HOP = {"connection", "keep-alive", "expect", "transfer-encoding", "te", "upgrade"}


@dataclass(frozen=True)
class Request:
    """A request as the client sent it."""

    method: str
    """Such as ``GET``."""

    path: str
    """Path and query."""

    headers: Mapping[str, str]
    """By name in lower case."""

    fault: str | None = None
    """What was done to it, the name of a field of `Faults`."""


@dataclass(frozen=True)
class Faults:
    """What the proxy does. Shares are chances of each request, from 0 to 1; the first that hits is done."""

    busy: float = 0.0
    """Answered 503 SlowDown; the server does not see the request."""

    unknown: float = 0.0
    """Answered 501 NotImplemented; the server does not see the request."""

    reset: float = 0.0
    """The connection is reset; the server does not see the request."""

    lose: float = 0.0
    """The server does it, and the connection is reset before the answer."""

    cut: float = 0.0
    """The body of a GET's answer ends, and the connection with it, after some bytes."""

    stall: float = 0.0
    """The body of a GET's answer stops after some bytes, and the connection stays open."""

    flip: float = 0.0
    """One bit of a GET's answer is another."""

    at: int | None = None
    """Byte at which bodies are cut, stalled or flipped; None draws one."""

    align: int = 1
    """Drawn bytes are multiples of this: 512 is a block of a tar."""

    bytes_per_s: float | None = None
    """Rate of each body of a request or an answer; None is as fast as it goes."""

    times: int | None = None
    """Most faults among the recorded requests; None has no end. The rate is not counted."""

    without: tuple[str, ...] = ()
    """Headers of answers, in lower case, that are left out, as by a server that does not know them."""


class FaultProxy:
    """A proxy on loopback before one server, for as long as the ``with`` block runs; it ends all its threads.

    Attributes:
        faults: What is done to the requests that come, or a function that says it for a request; may be replaced at
            any time.
        requests: The requests that came, in order, with the fault that each met; may be cleared.
    """

    def __init__(self, endpoint: str, faults: Faults | None = None, *, seed: int = 0, port: int = 0) -> None:
        """Prepare a proxy.

        Args:
            endpoint: the server, ``http://host:port``.
            faults: what is done at first.
            seed: of all that is drawn.
            port: where it listens; 0 takes a free one.
        """
        target = urlsplit(endpoint)
        assert target.hostname
        self.target = (target.hostname, target.port or 80)
        self.faults: Faults | Callable[[Request], Faults] = faults or Faults()
        self.requests: list[Request] = []
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._random = random.Random(seed)
        self._connections: set[socket.socket] = set()
        self._server = _Server(self, port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="fault-proxy")

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.server_port

    @property
    def url(self) -> str:
        """Its ``http://127.0.0.1:<port>``."""
        return f"http://127.0.0.1:{self.port}"

    def seen(self, method: str, path: str = "") -> list[Request]:
        """Return the recorded requests of a method whose path holds some text."""
        with self._lock:
            return [item for item in self.requests if item.method == method and path in item.path]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self._server.shutdown()
        self._thread.join()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()  # waits for the threads of all connections

    def done(self, fault: str) -> int:
        """Return how often a fault was done."""
        with self._lock:
            return sum(item.fault == fault for item in self.requests)

    def meet(self, request: Request) -> tuple[Faults, str | None]:
        """Record a request; return its faults and the name of the one that it meets, None for most."""
        faults = self.faults if isinstance(self.faults, Faults) else self.faults(request)
        with self._lock:
            fault = self._draw(faults, request.method)
            self.requests.append(replace(request, fault=fault))
        return faults, fault

    def _draw(self, faults: Faults, method: str) -> str | None:
        names: list[str] = ["busy", "unknown", "reset", "lose", *(("cut", "stall", "flip") if method == "GET" else ())]
        # One number for each request, whatever the faults are: the same requests meet the same luck.
        luck = self._random.random()
        if faults.times is not None and sum(item.fault is not None for item in self.requests) >= faults.times:
            return None
        for name in names:
            luck -= getattr(faults, name)
            if luck < 0:
                return name
        return None

    def place(self, faults: Faults, length: int) -> int:
        """Return the byte of a body at which a fault comes."""
        if faults.at is not None:
            return min(faults.at, max(0, length - 1))
        with self._lock:
            return self._random.randrange(max(1, length)) // faults.align * faults.align

    def opened(self, connection: socket.socket) -> None:
        """Note a client's connection."""
        with self._lock:
            self._connections.add(connection)
            if self.ended.is_set():
                connection.shutdown(socket.SHUT_RDWR)

    def closed(self, connection: socket.socket) -> None:
        """Forget a client's connection."""
        with self._lock:
            self._connections.discard(connection)


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 64

    def __init__(self, proxy: FaultProxy, port: int) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients hang up, as some tests want them to."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    faults = Faults()

    def setup(self) -> None:
        super().setup()
        self.proxy = cast(_Server, self.server).proxy
        self.proxy.opened(self.connection)

    def finish(self) -> None:
        self.proxy.closed(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def forward(self) -> None:
        """Pass a request on and its answer back, with the fault that it draws."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.faults, fault = self.proxy.meet(Request(self.command, self.path, headers))
        data = self._receive(int(headers.get("content-length", 0)))
        if fault in _REFUSALS:
            status, code = _REFUSALS[fault]
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self._answer(status, {"content-length": len(body)})
            self.wfile.write(b"" if self.command == "HEAD" else body)
        elif fault == "reset":
            self._reset()
        else:
            self._pass_on(data, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    def _pass_on(self, data: bytes, fault: str | None) -> None:
        server = http.client.HTTPConnection(*self.proxy.target, timeout=60)
        try:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    server.putheader(name, value)
            server.endheaders(data)
            answer = server.getresponse()
        except (ConnectionError, http.client.RemoteDisconnected):
            self._reset()  # the server is not there: no more is this one
        else:
            if fault == "lose":
                answer.read()
                self._reset()
            else:
                self._pass_back(answer, fault)
        finally:
            server.close()

    def _pass_back(self, answer: http.client.HTTPResponse, fault: str | None) -> None:
        left_out = {*_HOP_BY_HOP, *self.faults.without}
        headers: dict[str, object] = {
            name.lower(): value for name, value in answer.getheaders() if name.lower() not in left_out
        }
        body: IO[bytes] = answer
        if "content-length" not in headers and answer.status != http.HTTPStatus.NO_CONTENT:
            whole = answer.read()
            headers["content-length"], body = len(whole), io.BytesIO(whole)
        length = 0 if self.command == "HEAD" else int(str(headers.get("content-length", 0)))
        place = self.proxy.place(self.faults, length) if fault else length
        self._answer(answer.status, headers)
        self._send(body, place)
        if fault == "flip":
            self.wfile.write(bytes(byte ^ 1 for byte in body.read(1)))
            self._send(body, length - place - 1)
        elif fault == "stall":
            self.proxy.ended.wait()
        if fault in {"cut", "stall"}:
            self.close_connection = True

    def _receive(self, length: int) -> bytes:
        rate = self.faults.bytes_per_s
        if not rate:
            return self.rfile.read(length)
        data = bytearray()
        began = time.monotonic()
        while len(data) < length and (piece := self.rfile.read(min(_PIECE, length - len(data)))):
            data += piece
            time.sleep(max(0.0, began + len(data) / rate - time.monotonic()))
        return bytes(data)

    def _send(self, body: IO[bytes], length: int) -> None:
        rate = self.faults.bytes_per_s
        while length > 0 and (piece := body.read(min(_PIECE, length))):
            self.wfile.write(piece)
            length -= len(piece)
            if rate:
                time.sleep(len(piece) / rate)

    def _answer(self, status: int, headers: Mapping[str, object]) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def _reset(self) -> None:
        """Close so that the other side sees a reset, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True


@contextlib.contextmanager
def proxy_before(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Put a proxy without faults yet before the store that ``environment`` names, and shorten pauses between attempts.

    The patience is the real one, but in tests that see its end.
    """
    with FaultProxy(environment["AWS_ENDPOINT_URL"], seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setattr(retries, "LONGEST_PAUSE_S", 0.2)
        yield proxy
