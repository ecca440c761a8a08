"""Room of the cluster for ranks: wait for it before an attempt, see when a job can grow or must leave a node."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.jobs.placement import Placement, largest, room_in, room_on
from sharding.errors import UserError

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
# The resources of an attempt that has just ended are free a few seconds later.
_SETTLE_SECONDS = 15.0
# Nodes that come together are taken together.
_GROW_AFTER_SECONDS = 10.0
# A number of ranks that did not start is tried again: a node may have been slow. Each try interrupts the training.
_FIRST_PAUSE_SECONDS = 60.0
_LONGEST_PAUSE_SECONDS = 3600.0


class Sizes:
    """Numbers of ranks that a job may start with now; one that did not start in time is left out for a while.

    Free resources may be split over nodes, where no rank fits; or the start was slow, and the next one succeeds.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        """Begin with all numbers.

        Args:
            sizes: The numbers of ranks that the job may have, ascending, as `worlds` returns them.
        """
        self._all = tuple(sizes)
        self._failed, self._until, self._pause = 0, 0.0, _FIRST_PAUSE_SECONDS

    def now(self) -> tuple[int, ...]:
        """Return the numbers, ascending: all, or those below a number that has just failed to start."""
        if time.monotonic() >= self._until:
            return self._all
        return tuple(size for size in self._all if size < self._failed) or self._all

    def failed(self, world: int) -> None:
        """Leave out ``world`` and larger numbers, each time for twice as long, up to an hour."""
        self._failed, self._until = world, time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)

    def started(self, world: int) -> None:
        """Allow all numbers again if ``world`` ranks are as many as those that failed to start."""
        if world >= self._failed:
            self._until, self._pause = 0.0, _FIRST_PAUSE_SECONDS


def staying_nodes() -> list[Mapping[str, Any]]:
    """Return the cluster's nodes, as in `ray.nodes`, without those that are drained: no rank starts there."""
    import ray  # Ray is slow to import

    leaving = draining_nodes()
    return [node for node in ray.nodes() if node["NodeID"] not in leaving]


def draining_nodes() -> frozenset[str]:
    """Return the IDs of the nodes that Ray drains, as an autoscaler asks it to before a cloud takes a machine away."""
    # Ray is slow to import. Its only public way, `ray.train.get_preemption_info`, is a collective of all ranks.
    from ray._private.state import state

    return frozenset(state.get_draining_nodes())


def await_room(placement: Placement, sizes: Sequence[int], stops: threading.Event) -> int:
    """Return the number of ranks to start with; wait for the cluster to grow, and refuse it if it stays too small.

    A job of a fixed size waits for nodes that are busy; an elastic one takes what is free.

    Args:
        placement: Ranks and their resources.
        sizes: The numbers of ranks that the job may start with, ascending.
        stops: Ends the wait; the result has no meaning then.

    Raises:
        UserError: Too few ranks fit when `Placement.wait_for_resources` is over.
    """
    import ray  # Ray is slow to import

    began = time.monotonic()
    while not stops.is_set():
        total = _await_nodes(placement, sizes, stops)
        if not placement.elastic:
            return total
        free = largest(sizes, min(total, room_in(ray.available_resources(), placement)))
        if free and (free == total or time.monotonic() - began >= _SETTLE_SECONDS):
            return free
        stops.wait(_POLL_SECONDS)
    return 0


def _await_nodes(placement: Placement, sizes: Sequence[int], stops: threading.Event) -> int:
    """Return the largest number of ranks that fits on the nodes, busy or not; wait until one does."""
    # Ray is slow to import
    from ray.util import placement_group, remove_placement_group

    if world := largest(sizes, room_on(staying_nodes(), placement)):
        return world
    # An autoscaler grows a cluster by the resources that are requested.
    demand = placement_group([placement.resources] * sizes[-1], strategy="SPREAD")
    try:
        deadline = time.monotonic() + placement.wait_for_resources
        while not (world := largest(sizes, room := room_on(staying_nodes(), placement))) and not stops.is_set():
            if time.monotonic() >= deadline:
                raise UserError(_too_small(placement, sizes, room))
            stops.wait(_POLL_SECONDS)
        return world
    finally:
        remove_placement_group(demand)


def release_room() -> None:
    """Remove the placement groups of this driver, which ended attempts have left.

    Ray Train 2.60 removes its own, but not after Ray's memory monitor has killed a rank: its shutdown of the ranks then
    fails. Their resources would stay taken, and the next attempt would wait for them for ever.
    """
    import ray  # Ray is slow to import
    from ray.util import placement_group_table, remove_placement_group
    from ray.util.placement_group import PlacementGroup, PlacementGroupID

    # The ID ends with that of the job that made the group.
    driver = ray.get_runtime_context().get_job_id()
    try:
        for number, group in placement_group_table().items():
            if number.endswith(driver) and group["state"] != "REMOVED":
                remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(number)))
    except ray.exceptions.RayError as error:  # The head is slow or restarts: this is no reason to end the job.
        logger.warning("resources of the attempt before may still be taken: %s", error)


def _too_small(placement: Placement, sizes: Sequence[int], room: int) -> str:
    each = " and ".join(f"{amount:g} {name}" for name, amount in placement.resources.items())
    waited = f" after {placement.wait_for_resources:g} s" if placement.wait_for_resources else ""
    least = f" (the least that divides the batch is {sizes[0]})" if sizes[0] != placement.fewest else ""
    return (
        f"--workers is {placement.workers} with {each} each{least}, and the cluster has room for {room}{waited}: ask"
        " for less, or give a cluster that grows time with --wait-for-resources SECONDS"
    )


class Growth:
    """Whether an elastic job that runs could run with more ranks, for long enough to be worth a restart."""

    def __init__(self, placement: Placement, sizes: Sizes, world: int) -> None:
        """Watch for a job that has ``world`` ranks of the possible ``sizes``."""
        self._placement, self._sizes, self._world = placement, sizes, world
        self._since: float | None = None

    def __call__(self) -> bool:
        """Return whether more ranks have had room for `_GROW_AFTER_SECONDS` without a break."""
        if self._world >= self._sizes.now()[-1] or not self._has_room():
            self._since = None
            return False
        now = time.monotonic()
        if self._since is None:
            self._since = now
        return now - self._since >= _GROW_AFTER_SECONDS

    def _has_room(self) -> bool:
        import ray  # Ray is slow to import

        total = room_on(staying_nodes(), self._placement)
        more = largest(self._sizes.now(), min(total, self._world + room_in(ray.available_resources(), self._placement)))
        if more > self._world and self._since is None:
            logger.info("the cluster has room for %d ranks; %d run", more, self._world)
        return more > self._world


class Drain:
    """Whether a node that holds a rank of the job is being drained."""

    def __init__(self, notice: Any) -> None:
        """Watch the ranks that tell the actor of `cluster.jobs.notice` their nodes."""
        self._notice = notice

    def __call__(self) -> bool:
        """Return whether one is, and say so."""
        leaving = draining_nodes()
        if not leaving:
            return False
        import ray  # Ray is slow to import

        held = leaving.intersection(ray.get(self._notice.places.remote()))
        if held:
            names = sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] in held)
            logger.info(
                "Ray drains node %s: the ranks stop at a checkpoint, to start again elsewhere", ", ".join(names)
            )
        return bool(held)
