"""Measured values of steps, sent from each rank to all ranks without making the host wait for the device.

Values computed on the device stay there until a window of steps is complete. One collective then gathers the window
from all ranks. Its copy to the host is read one window later, when it has long arrived: the device always has the next
steps queued. Windows are cut by step number, so every rank reads the same rows at the same step, and all ranks stop
together if a row requires it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.batches import send
from pipeline.world import World

LONGEST_WINDOW = 10
"""Upper bound of the steps in a window: a loss that is not finite is found after at most two windows."""


@dataclass(frozen=True)
class StepRow:
    """The values of one step on all ranks."""

    step: int
    """Optimizer step, from 1."""
    epoch: int
    """Epoch, from 0."""
    by_rank: Mapping[str, Tensor]
    """Values [ranks] by name, float64 on the CPU."""


@dataclass(frozen=True)
class _Window:
    """Rows that are being copied to the host."""

    steps: Sequence[tuple[int, int]]
    """Step and epoch of each row."""
    names: Sequence[str]
    """Names of the values."""
    values: Tensor
    """[ranks, steps, values], page-locked if it comes from a GPU."""
    arrived: torch.cuda.Event | None
    """Event at the end of the copy; None if there is nothing to wait for."""

    def wait(self) -> None:
        """Wait until the rows are on the host."""
        if self.arrived is not None:
            self.arrived.synchronize()

    def rows(self) -> Iterator[StepRow]:
        """Yield the rows; call `wait` first."""
        for number, (step, epoch) in enumerate(self.steps):
            by_rank = self.values[:, number].unbind(1)
            yield StepRow(step, epoch, dict(zip(self.names, by_rank, strict=True)))


class StepValues:
    """Collector of the steps' values on one rank; all ranks call `put` and `arrived` at the same steps."""

    def __init__(self, world: World, log_every: int, lag: int | None = None) -> None:
        """Prepare to collect.

        Args:
            world: This process's place.
            log_every: Steps between rows of the log; a window is never longer.
            lag: Number of newest windows that `arrived` does not wait for; by default 1 on CUDA, and 0 on the CPU,
                where values are available at once.
        """
        self._world = world
        self._window = min(log_every, LONGEST_WINDOW)
        self._lag = int(world.device.type == "cuda") if lag is None else lag
        self._names: list[str] = []
        self._steps: list[tuple[int, int]] = []
        self._measured: list[Tensor] = []
        self._known: list[list[float]] = []
        self._sent: deque[_Window] = deque()
        self.wait_seconds = 0.0
        """Time that the last call of `arrived` waited for the device, seconds."""

    def put(self, step: int, epoch: int, measured: Mapping[str, Tensor], known: Mapping[str, float]) -> None:
        """Add a step's values; all steps and all ranks name the same ones in the same order.

        Args:
            step: Optimizer step, from 1.
            epoch: Epoch, from 0.
            measured: Scalars that the device computes; read later, so they must not change.
            known: Values that the host knows already.
        """
        self._names = [*measured, *known]
        self._steps.append((step, epoch))
        self._measured.append(torch.stack([value.double() for value in measured.values()]))
        self._known.append(list(known.values()))
        if step % self._window == 0:
            self._send()

    def arrived(self, *, everything: bool = False) -> Iterator[StepRow]:
        """Yield the rows of all windows except the last one sent, in order; with ``everything``, all rows."""
        if everything and self._steps:
            self._send()
        self.wait_seconds = 0.0
        while len(self._sent) > (0 if everything else self._lag):
            window = self._sent.popleft()
            began = time.perf_counter()
            window.wait()
            self.wait_seconds += time.perf_counter() - began
            yield from window.rows()

    def _send(self) -> None:
        known = send(torch.tensor(self._known, dtype=torch.float64), self._world.device)
        mine = torch.cat([torch.stack(self._measured), known], dim=1)
        everyone = self._world.gather_tensor(mine)
        if everyone.is_cuda:
            values = torch.empty(everyone.shape, dtype=everyone.dtype, pin_memory=True)
            values.copy_(everyone, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        else:
            values, arrived = everyone, None
        self._sent.append(_Window(tuple(self._steps), self._names, values, arrived))
        self._steps.clear()
        self._measured.clear()
        self._known.clear()
