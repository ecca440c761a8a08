"""The process group: who is who, and the few collectives the loop needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place among all that train together."""

    rank: int
    """0-based number of this process."""
    size: int
    """Number of processes."""
    device: torch.device
    """Where this process computes."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def gather(self, values: Sequence[float]) -> Tensor:
        """Return every rank's ``values`` as float64 [ranks, values], on the CPU, the same on all ranks."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        return torch.stack(everyone).cpu()

    def gather_objects(self, value: object) -> list[object]:
        """Return every rank's ``value``, a plain Python object, in rank order."""
        everyone: list[object] = [None] * self.size
        dist.all_gather_object(everyone, value)
        return everyone

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's ``value`` on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def join_world() -> World:
    """Join the process group that the environment describes, or make one of a single process.

    Ray Train has joined already; torchrun sets RANK, WORLD_SIZE and MASTER_ADDR; without these this process is alone.
    Ranks on CUDA speak NCCL, others gloo.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return World(dist.get_rank(), dist.get_world_size(), device)


def leave_world() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
