"""A real S3 server behind a proxy that passes on so many bytes a second, for benchmarks and drills."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from cluster.local.objectstore import ObjectStore
from tests.faults import FaultProxy, Faults


def serve_slowly(endpoint: str, rate: float, said: Connection) -> None:
    """Pass requests on to a server, each body at ``rate`` bytes a second, until the other end of the pipe is closed."""
    with FaultProxy(endpoint, Faults(bytes_per_s=rate)) as proxy, contextlib.suppress(EOFError):
        said.send(proxy.url)
        said.recv()


@contextlib.contextmanager
def slow_store(folder: Path, rate: float) -> Iterator[Mapping[str, str]]:
    """Run a store with the bucket ``runs`` for the block; yield a client's variables. The proxy is another process.

    Args:
        folder: The store's folder.
        rate: Bytes a second of each request's or answer's body.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with ObjectStore(folder, bucket="runs") as store:
        proxy = context.Process(target=serve_slowly, args=(store.environment["AWS_ENDPOINT_URL"], rate, theirs))
        proxy.start()
        theirs.close()
        try:
            yield {**store.environment, "AWS_ENDPOINT_URL": ours.recv()}
        finally:
            ours.close()
            proxy.join()
