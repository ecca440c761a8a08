"""What a rank writes into the run folder while it trains: its events, and on rank 0 the aggregate and the CSVs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.quality.metrics import ADJUSTED, METRICS
from pipeline.reporting.events import AggregateEvents, CsvLog, RankEvents
from pipeline.reporting.run_folder import RunFolder
from pipeline.world import World

LOSS_TAGS = ("train/loss", "train/mse", "train/mae", "train/ssim_loss", "train/sam_loss")
# Counts of a rank so far: of its dataset, and last of its run folder's store.
DATA_TAGS = ("data/retries", "data/read_again", "data/quarantined_chips", "store/retries")
STEP_TAGS = (
    *LOSS_TAGS,
    "train/grad_norm",
    "train/learning_rate",
    "time/samples_per_second",
    "time/data_wait_seconds",
    *DATA_TAGS,
)
VAL_TAGS = ("val/loss", *(f"val/{name}{suffix}" for suffix in ("", ADJUSTED) for name in METRICS))


class RunLogs:
    """The open files of one rank; close it when training ends."""

    def __init__(self, run: RunFolder, world: World, config: TrainConfig, first_step: int) -> None:
        """Open them to go on at ``first_step``; what a killed process wrote of later steps is dropped."""
        self._run = run
        self._rank = world.rank
        self._every = config.log_every
        self._events = RankEvents(run, world.rank, first_step)
        self._aggregate: AggregateEvents | None = None
        self._metrics: CsvLog | None = None
        self._batches: CsvLog | None = None
        if world.is_main:
            self._aggregate = AggregateEvents(run, first_step)
            self._metrics = CsvLog(run.fetch("metrics.csv"), ["step", "epoch", *STEP_TAGS, *VAL_TAGS], first_step - 1)
            if config.log_batches:
                self._batches = CsvLog(run.fetch("batches.csv"), ["step", "epoch", "chips"], first_step - 1)

    @property
    def wants_batches(self) -> bool:
        """Whether this rank writes batches.csv."""
        return self._batches is not None

    def batch(self, step: int, epoch: int, chips: Sequence[str]) -> None:
        """Write the names of a global batch's chips, in slot order."""
        if self._batches:
            self._batches.row({"step": step, "epoch": epoch, "chips": ";".join(chips)})

    def step(self, step: int, epoch: int, by_rank: Tensor, validation: Mapping[str, float]) -> None:
        """Write a step's values.

        Args:
            step: Optimizer step, from 1.
            epoch: Epoch, from 0.
            by_rank: [ranks, STEP_TAGS] values.
            validation: Means by VAL_TAGS where this step was followed by a validation, else empty.
        """
        if step % self._every and not validation:
            return
        self._events.scalars(step, dict(zip(STEP_TAGS, by_rank[self._rank].tolist(), strict=True)))
        if self._aggregate and self._metrics:
            means = self._aggregate.scalars(step, STEP_TAGS, by_rank)
            self._metrics.row({"step": step, "epoch": epoch, **means, **validation})

    def validation(self, step: int, metrics: Mapping[str, float], by_rank: Tensor) -> None:
        """Write a validation.

        Args:
            step: Optimizer step.
            metrics: Means over all chips, by VAL_TAGS.
            by_rank: [ranks, VAL_TAGS] means over each rank's chips, NaN for a rank that had none.
        """
        if not by_rank[self._rank].isnan().any():
            self._events.scalars(step, dict(zip(VAL_TAGS, by_rank[self._rank].tolist(), strict=True)))
        if self._aggregate:
            # The mean of all is over chips, not over ranks.
            self._aggregate.scalars(step, VAL_TAGS, by_rank[~by_rank.isnan().any(1)], means=metrics)

    def panel(self, step: int, tag: str, image: npt.NDArray[np.uint8]) -> None:
        """Write an image panel [H, W, 3]; rank 0 only."""
        if self._aggregate:
            self._aggregate.image(step, tag, image, self._run.local / "images")

    def close(self) -> None:
        """Flush and close every file."""
        for log in (self._events, self._aggregate, self._metrics, self._batches):
            if log is not None:
                log.close()
