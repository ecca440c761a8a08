"""Ranks of a job and their resources, and which numbers of ranks a run can have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from msgspec import Meta

from sharding.arguments import check_values
from sharding.errors import UserError

MOST_RANKS = 100_000
"""Largest number of ranks of a job."""
_WORKERS = re.compile(r"(\d{1,6})(?:\.\.(\d{1,6}))?", re.ASCII)


def _workers(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdecimal() else text


@dataclass(frozen=True)
class Placement:
    """Number of ranks of a job, and the resources of each."""

    workers: int | str = field(metadata={"metavar": "N|MIN..MAX", "parse": _workers})
    """Ranks, spread over the nodes: a number, or MIN..MAX for an elastic job, which runs with the largest number in
    that range that fits on the cluster and divides the global batch. It goes on with fewer when a node is lost, and
    with more, after a checkpoint, when one comes."""
    cpus_per_worker: Annotated[float, Meta(gt=0, le=10_000)] = field(default=1.0, metadata={"metavar": "C"})
    """CPUs that Ray reserves for each rank, above 0. `train.threads_per_rank` sets the threads."""
    gpus_per_worker: Annotated[float, Meta(ge=0, le=1000)] = field(default=0.0, metadata={"metavar": "G"})
    """GPUs of each rank, a whole number: 0 trains on CPU with gloo, more on CUDA with NCCL."""
    max_failures: Annotated[int, Meta(ge=0, le=10**6)] = 2
    """Restarts after a lost or failed rank, node or controller or an unavailable store, 0 or more; each resumes from
    the newest checkpoint."""
    wait_for_resources: Annotated[float, Meta(ge=0, le=10**7)] = field(default=0.0, metadata={"metavar": "SECONDS"})
    """Seconds that a cluster which is too small gets to grow, before the first attempt and each restart; 0 refuses at
    once."""

    def __post_init__(self) -> None:
        check_values(self)
        self._bounds()
        if not float(self.gpus_per_worker).is_integer():
            # NCCL refuses two ranks on one GPU.
            raise UserError(f"--gpus-per-worker {self.gpus_per_worker:g} is no whole number: give 0 or more GPUs")

    @property
    def fewest(self) -> int:
        """Return the least number of ranks."""
        return self._bounds()[0]

    @property
    def most(self) -> int:
        """Return the largest number of ranks."""
        return self._bounds()[1]

    @property
    def elastic(self) -> bool:
        """Return whether the number of ranks may change."""
        return self.fewest < self.most

    @property
    def resources(self) -> dict[str, float]:
        """Return the resources that Ray reserves for each rank."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker, **gpus}

    @property
    def backend(self) -> str:
        """Return the communication backend of torch's process group."""
        return "nccl" if self.gpus_per_worker else "gloo"

    def _bounds(self) -> tuple[int, int]:
        found = _WORKERS.fullmatch(str(self.workers))
        if not found:
            raise UserError(f"--workers {self.workers!r} is no number of ranks: give N, or MIN..MAX for an elastic job")
        fewest, most = int(found[1]), int(found[2] or found[1])
        if not 1 <= fewest <= most <= MOST_RANKS:
            raise UserError(
                f"--workers {self.workers} is out of range: it must be a whole number from 1 to {MOST_RANKS:,}, or two"
                " of them in ascending order, MIN..MAX"
            )
        return fewest, most


def worlds(placement: Placement, global_batch: int, micro_batch: int) -> tuple[int, ...]:
    """Return the numbers of ranks that a job may run with, ascending: those that divide the global batch.

    Args:
        placement: Ranks of the job.
        global_batch: Chips of an optimizer step, `train.global_batch`.
        micro_batch: `train.micro_batch`.

    Raises:
        UserError: There is none.
    """
    from pipeline.order import BatchPlan  # slow: imports torch

    if not placement.elastic:
        return (BatchPlan.create(global_batch, micro_batch, placement.fewest).world_size,)
    found = []
    for ranks in range(placement.fewest, min(placement.most, global_batch) + 1):
        if global_batch % ranks:
            continue
        try:
            found.append(BatchPlan.create(global_batch, micro_batch, ranks).world_size)
        except UserError:
            continue  # the micro-batch does not divide a rank's part
    if not found:
        raise UserError(
            f"no number of ranks in --workers {placement.workers} divides train.global_batch = {global_batch} with"
            f" train.micro_batch = {micro_batch}: widen the range, or change the batch"
        )
    return tuple(found)


def largest(worlds: Sequence[int], room: int) -> int:
    """Return the largest number of ranks that fits in ``room``; 0 if none does."""
    return max((ranks for ranks in worlds if ranks <= room), default=0)


def room_on(nodes: Sequence[Mapping[str, Any]], placement: Placement) -> int:
    """Return the number of ranks that fit on the cluster's nodes (as in `ray.nodes`) if nothing else runs there."""
    return sum(_fitting(node["Resources"], placement) for node in nodes if node["Alive"])


def room_in(free: Mapping[str, float], placement: Placement) -> int:
    """Return the number of ranks for which free resources of the whole cluster are enough, wherever they are."""
    return _fitting(free, placement)


def _fitting(resources: Mapping[str, float], placement: Placement) -> int:
    def parts(amount: float) -> int:
        return round(amount * 10_000)  # Like Ray's count, without binary rounding.

    return min(parts(resources.get(name, 0.0)) // parts(each) for name, each in placement.resources.items())
