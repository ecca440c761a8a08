"""Checkpoints that do not stop the training: a thread writes a copy of the state while the next steps are taken."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.engines.engine import TrainState
from pipeline.reporting.run_folder import RunFolder
from pipeline.training.checkpoint import Position, prune_checkpoints, save_checkpoint
from pipeline.world import Channel, World
from sharding.storage.lock import Lock

logger = logging.getLogger(__name__)

_STORED, _FAILED = "stored", "failed"
POLL_S = 0.02
"""Seconds between looks for the other ranks' message."""


@dataclass(frozen=True)
class Snapshot:
    """Copy of a training's state, which later steps do not change."""

    best: bool
    """Whether the weights are kept as the best."""
    full: bool
    """Whether a full checkpoint is made."""
    position: Position
    """Position of the training."""
    state: TrainState
    """Weights, and moments if a full checkpoint is made; empty on ranks other than 0."""
    generators: list[dict[str, Tensor]]
    """Each rank's generator states."""
    began: float
    """Time at which the training began to wait for it, seconds of `time.perf_counter`."""
    stalled: float
    """Seconds that the training waited for it."""


class Saver:
    """Writer of the checkpoints of a run; each rank has one, and at most one checkpoint is written at a time.

    Every rank's thread stores the logs of the steps before; rank 0 then publishes the checkpoint that follows them.
    """

    def __init__(self, run: RunFolder, world: World, config: RunConfig, channel: Channel, lock: Lock | None) -> None:
        """Prepare to write.

        Args:
            run: The run folder.
            world: This process's place.
            config: The run's resolved configuration.
            channel: Messages between the ranks.
            lock: Lock of the run folder, on rank 0.
        """
        self._run, self._world, self._config, self._channel, self._lock = run, world, config, channel, lock
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._given_up = threading.Event()
        self.seconds = 0.0
        """Seconds from the last snapshot until it was published, on rank 0."""

    def submit(self, snapshot: Snapshot) -> None:
        """Write a snapshot in the thread; call `wait` before."""
        self._writing = self._pool.submit(self._write, snapshot)

    def wait(self) -> BaseException | None:
        """Wait until the last snapshot is written, and return the error if it failed."""
        return self._writing.exception() if self._writing is not None else None

    @property
    def failed(self) -> bool:
        """Return whether the last snapshot could not be written."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def close(self) -> None:
        """End the thread. What is being written is published, unless other ranks have not stored their logs yet."""
        self._given_up.set()
        self._pool.shutdown()

    def _write(self, snapshot: Snapshot) -> None:
        step = snapshot.position.step
        # Logs of the steps before must be in the store before the checkpoint that follows them.
        key = f"logs/{step}/{self._world.rank}"
        try:
            self._run.sync()
        except BaseException:
            self._channel.put(key, _FAILED)
            raise
        self._channel.put(key, _STORED)
        if not self._world.is_main or not self._all_stored(step):
            return
        if self._lock:
            self._lock.check()
        # The best weights first: a process that resumes at the full checkpoint then knows their loss.
        names = [f"{kind}-{step}" for kind, made in (("best", snapshot.best), ("step", snapshot.full)) if made]
        for name in names:
            best = name.startswith("best")
            state = replace(snapshot.state, moments={}) if best else snapshot.state
            save_checkpoint(self._run.storage, name, self._config, snapshot.position, state, snapshot.generators)
            keep = 1 if best else self._config.train.keep_checkpoints
            prune_checkpoints(self._run.storage, name.partition("-")[0], step, keep)
        self.seconds = time.perf_counter() - snapshot.began
        for name in names:
            logger.info(
                "checkpoint %s written in %.2f s; the training waited %.2f s", name, self.seconds, snapshot.stalled
            )

    def _all_stored(self, step: int) -> bool:
        """Wait until every rank has stored its logs; return False if one cannot, or if the training ends before."""
        missing = [f"logs/{step}/{rank}" for rank in range(self._world.size)]
        while missing:
            said = {name: self._channel.get(name) for name in missing}
            if _FAILED in said.values():
                return False  # All ranks meet that rank's error (`Saver.failed`).
            missing = [name for name, text in said.items() if text is None]
            if missing and self._given_up.wait(POLL_S):
                return False
        return True


def generator_states(world: World) -> dict[str, Tensor]:
    """Return the states of this rank's random generators, by device type."""
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states
