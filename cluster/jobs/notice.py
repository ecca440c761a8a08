"""Request to stop at a checkpoint: from the driver, which sees signals and the cluster, to the ranks."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0


class Stopped(Exception):
    """The job was told to end, and what it ran has stopped at a checkpoint."""


class Notice:
    """Ray actor that holds the request and the ranks' nodes; it runs on the driver's node and ends with the driver."""

    def __init__(self) -> None:
        """Begin without a request."""
        self._asked = False
        self._places = set[str]()

    def begin(self) -> None:
        """Withdraw the request and forget the nodes, before an attempt."""
        self._asked = False
        self._places.clear()

    def place(self, node: str) -> None:
        """Note the ID of a node that holds a rank."""
        self._places.add(node)

    def places(self) -> set[str]:
        """Return the IDs of the nodes that hold ranks of this attempt."""
        return self._places

    def ask(self) -> None:
        """Make the request."""
        self._asked = True

    def asked(self) -> bool:
        """Return whether the ranks are to stop."""
        return self._asked


def start_notice() -> Any:
    """Start the actor on this node and return its handle."""
    import ray  # Ray is slow to import
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Notice).remote()


def listen(notice: Any) -> threading.Event:
    """Return an event that is set after the request; a thread asks for it, so that a step never waits for the answer.

    Args:
        notice: Handle of the actor.
    """
    import ray  # Ray is slow to import

    asked = threading.Event()
    if ray.get(notice.asked.remote()):  # before the ranks were there: they need not begin
        asked.set()
    threading.Thread(target=_ask_until_set, args=(notice, asked), name="notice", daemon=True).start()
    return asked


def _ask_until_set(notice: Any, asked: threading.Event) -> None:
    import ray  # Ray is slow to import

    while not asked.wait(_POLL_SECONDS):
        try:
            if ray.get(notice.asked.remote()):
                asked.set()
        except ray.exceptions.RayError:  # The driver has ended, and with it the actor: Ray ends this process.
            return


@contextmanager
def stops_on(number: signal.Signals) -> Iterator[threading.Event]:
    """Set the event on a signal within the block, so that a checkpoint can be written; for a process's main thread."""
    stops = threading.Event()

    def note(number: int, frame: object) -> None:
        stops.set()

    before = signal.signal(number, note)
    try:
        yield stops
    finally:
        signal.signal(number, before)


class Watch:
    """Thread of the driver during an attempt: it makes the request when the ranks must end or start again."""

    def __init__(self, notice: Any, stops: threading.Event, *reasons: Callable[[], bool]) -> None:
        """Prepare to watch.

        Args:
            notice: Handle of the actor.
            stops: Set when the job must end.
            reasons: Asked once a second; each returns whether the ranks are to stop and start again, for example
                with more of them.
        """
        self._notice, self._stops, self._reasons = notice, stops, reasons
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        """End watching."""
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(_POLL_SECONDS):
            if self._stops.is_set() or self._must_start_again():
                self._notice.ask.remote()
                return

    def _must_start_again(self) -> bool:
        try:
            return any(reason() for reason in self._reasons)
        except Exception as error:  # the head does not answer: a request to stop must still be passed on
            logger.warning("the cluster's resources are not known now: %s", error)
            return False
