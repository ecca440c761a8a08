"""The process group: the ranks, and the few collectives that the loop needs."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore

T = TypeVar("T")

COLLECTIVE_LIMIT = timedelta(minutes=30)
"""Time that a rank waits for others in a collective: longer than `DataConfig.store_wait_seconds` may be."""


@dataclass(frozen=True)
class World:
    """This process's place among all processes that train together."""

    rank: int
    """0-based number of this process."""
    size: int
    """Number of processes."""
    device: torch.device
    """Device that this process computes on."""

    @property
    def is_main(self) -> bool:
        """Return whether this process writes files that are written once per run."""
        return self.rank == 0

    def gather(self, values: Sequence[float]) -> Tensor:
        """Return every rank's ``values`` as float64 [ranks, values], on the CPU, the same on all ranks."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.gather_tensor(mine).cpu()

    def gather_tensor(self, mine: Tensor) -> Tensor:
        """Return every rank's equal-shaped tensor as [ranks, ...] on the device; over NCCL the host does not wait."""
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        return torch.stack(everyone)

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum of every rank's tensor on the device; over NCCL the host does not wait."""
        total = value.clone()
        dist.all_reduce(total)
        return total

    def gather_objects(self, value: T) -> list[T]:
        """Return every rank's ``value``, any picklable object, in rank order."""
        if self.size == 1:
            return [value]
        everyone: list[T] = [value] * self.size
        dist.all_gather_object(everyone, value)
        return everyone

    def raise_together(self, error: BaseException | None) -> None:
        """Raise the first error that any rank passes, on every rank; do nothing if all pass None."""
        for met in self.gather_objects(error):
            if met is not None:
                raise met


class Channel:
    """Short messages between ranks, through the store of the process group: no rank waits for another one.

    It has a connection of its own: collectives that wait for the store do not delay it. If the process that serves the
    store is stopped, a call may block; call it from a thread that nobody waits for.
    """

    def __init__(self, world: World) -> None:
        """Open a channel of its own; all ranks call it together."""
        # A store may live longer than a training: its names must not meet those of another one.
        name = world.gather_objects(uuid.uuid4().hex)[0]
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = PrefixStore(name, store.clone())

    def put(self, name: str, text: str) -> None:
        """Store a message under ``name``, in place of an earlier one."""
        self._store.set(name, text)

    def get(self, name: str) -> str | None:
        """Return the message under ``name``, None if there is none."""
        return self._store.get(name).decode() if self._store.check([name]) else None


def join_world() -> World:
    """Join the process group that the environment describes, or create one of a single process.

    Ray Train has joined already; torchrun sets RANK, WORLD_SIZE and MASTER_ADDR; without these this process is alone.
    Ranks on CUDA use NCCL, others gloo. An existing group decides the device type of its ranks, even if this process
    sees other devices.
    """
    if dist.is_initialized():
        # The maker of the group has chosen each rank's device: its number may differ from the local rank.
        device = _cuda(torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    elif torch.cuda.is_available():
        device = _cuda(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        device = torch.device("cpu")
    _tell_deepspeed(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=COLLECTIVE_LIMIT)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return World(dist.get_rank(), dist.get_world_size(), device)


def current_world() -> World:
    """Return the group that this process is in or that the environment describes; else a world of one, without group.

    Evaluation needs no more than this: unlike DeepSpeed it works without a process group.
    """
    if dist.is_initialized() or "RANK" in os.environ:
        return join_world()
    return World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _cuda(index: int) -> torch.device:
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _tell_deepspeed(device: torch.device) -> None:
    """Make DeepSpeed compute on ``device``: it reads the kind from a variable, and the number from the local rank."""
    os.environ["DS_ACCELERATOR"] = device.type
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)


def leave_world() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
