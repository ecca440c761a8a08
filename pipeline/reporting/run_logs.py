"""Log files of a rank in the run folder: its events, and on rank 0 the aggregate events and the CSVs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.config import RunConfig, TrainConfig
from pipeline.reporting.alerts import Alerts, AlertsConfig
from pipeline.reporting.events import AggregateEvents, CsvLog, RankEvents
from pipeline.reporting.run_folder import RunFolder
from pipeline.reporting.tags import ALERTS, RENAMED, STEP_TAGS, VAL_TAGS, Averaged, over_ranks
from pipeline.reporting.tracker import Tracker, open_tracker
from pipeline.world import World

logger = logging.getLogger(__name__)

REMIND_S = 60.0
"""Seconds between two log lines about rows that cannot be written."""


class _LostRows:
    """Context that lets training continue without rows that cannot be written, and says so at most once a minute."""

    def __init__(self) -> None:
        self._said = -math.inf
        self._lost = 0

    def __enter__(self) -> None:
        """Begin to write."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Log an error of the operating system, such as a full disk, instead of raising it."""
        if not isinstance(error, OSError):
            return False
        self._lost += 1
        if time.monotonic() - self._said >= REMIND_S:
            self._said = time.monotonic()
            logger.error(
                "events and metrics are being lost, %d times so far: %s; training continues, free the disk",
                self._lost,
                error,
            )
        return True


class RunLogs:
    """The open log files of one rank; close it when training ends. A full disk loses rows, it ends no training."""

    def __init__(
        self,
        run: RunFolder,
        world: World,
        config: TrainConfig,
        first_step: int,
        alerts: AlertsConfig | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        """Open the files to resume at ``first_step``; later steps, written by a killed process, are dropped."""
        self._run = run
        self._rank = world.rank
        self._every = config.log_every
        self._since = Averaged()
        self._lost_rows = _LostRows()
        self._events = RankEvents(run, world.rank, first_step)
        self._aggregate: AggregateEvents | None = None
        self._metrics: CsvLog | None = None
        self._batches: CsvLog | None = None
        self._alerts: Alerts | None = None
        self._tracker = tracker
        if world.is_main:
            self._aggregate = AggregateEvents(run, first_step)
            columns = ["step", "epoch", *STEP_TAGS, *VAL_TAGS]
            self._metrics = CsvLog(run.fetch("metrics.csv"), columns, first_step - 1, RENAMED)
            if config.log_batches:
                self._batches = CsvLog(run.fetch("batches.csv"), ["step", "epoch", "chips"], first_step - 1)
            if alerts:
                self._alerts = Alerts(alerts, run.storage.uri, self._note)

    def _note(self, step: int, text: str) -> None:
        if self._aggregate:
            with self._lost_rows:
                self._aggregate.text(step, text, ALERTS)

    @property
    def wants_batches(self) -> bool:
        """Return whether this rank writes batches.csv."""
        return self._batches is not None

    def batch(self, step: int, epoch: int, chips: Sequence[str]) -> None:
        """Write the names of a global batch's chips, in slot order."""
        if self._batches:
            with self._lost_rows:
                self._batches.row({"step": step, "epoch": epoch, "chips": ";".join(chips)})

    def write_step(self, step: int, epoch: int, by_rank: Mapping[str, Tensor], validation: Mapping[str, float]) -> None:
        """Add a step's values; write a row every ``train.log_every`` steps and at each validated step.

        Args:
            step: Optimizer step, from 1.
            epoch: Epoch, from 0.
            by_rank: Values [ranks] of each of STEP_TAGS.
            validation: Means by VAL_TAGS if a validation followed this step, else empty.
        """
        if self._alerts:
            self._alerts.step(step)
        self._since.add(by_rank)
        if step % self._every and not validation:
            return
        row = self._since.take()
        with self._lost_rows:
            self._events.scalars(step, {tag: values[self._rank].item() for tag, values in row.items()})
        if self._aggregate and self._metrics:
            merged = over_ranks(row)
            with self._lost_rows:
                self._aggregate.scalars(step, row, merged)
            with self._lost_rows:
                self._metrics.row({"step": step, "epoch": epoch, **merged, **validation})
            if self._tracker:
                self._tracker.scalars(step, merged)

    def validation(self, step: int, metrics: Mapping[str, float], by_rank: Tensor, group: str = "val") -> None:
        """Write a validation.

        Args:
            step: Optimizer step.
            metrics: Means over all chips, by VAL_TAGS.
            by_rank: [ranks, VAL_TAGS] means over each rank's chips, NaN for a rank without chips.
            group: First part of the tags in the events.
        """
        if self._alerts and group == "val":
            self._alerts.validated(step, metrics)
        tags = [f"{group}/{tag.removeprefix('val/')}" for tag in VAL_TAGS]
        if not by_rank[self._rank].isnan().any():
            with self._lost_rows:
                self._events.scalars(step, dict(zip(tags, by_rank[self._rank].tolist(), strict=True)))
        if self._aggregate:
            seen = by_rank[~by_rank.isnan().any(1)]
            # The overall mean is over chips, not over ranks.
            merged = dict(zip(tags, metrics.values(), strict=True))
            with self._lost_rows:
                self._aggregate.scalars(step, dict(zip(tags, seen.unbind(1), strict=True)), merged)
            if self._tracker:
                self._tracker.scalars(step, merged)

    def panel(self, step: int, tag: str, image: npt.NDArray[np.uint8]) -> None:
        """Write an image panel [H, W, 3]; rank 0 only."""
        if self._aggregate:
            with self._lost_rows:
                self._aggregate.image(step, tag, image, self._run.local / "images")

    def alert(self, step: int, reason: str) -> None:
        """Raise an alert; nothing happens on other ranks than 0, or without rules."""
        if self._alerts:
            self._alerts.send(step, reason)

    def close(self) -> None:
        """Flush and close every file."""
        if self._alerts:
            self._alerts.close()
        for log in (self._events, self._aggregate, self._metrics, self._batches):
            if log is not None:
                with self._lost_rows:
                    log.close()
        if self._tracker:
            self._tracker.close()


def open_logs(run: RunFolder, world: World, config: RunConfig, first_step: int) -> RunLogs:
    """Open the log files of a rank (`RunLogs`), and on rank 0 the run at the tracker; all ranks call it together.

    Raises:
        UserError: On every rank: the tracker cannot be used.
    """
    return RunLogs(run, world, config.train, first_step, config.alerts, open_tracker(config, run.storage, world))
