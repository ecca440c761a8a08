"""Training output: TensorBoard events of each rank and of all ranks together, metrics.csv, batches.csv."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pipeline.reporting.run_folder import TEMPORARY_SUFFIX, RunFolder

AGGREGATE = "events/aggregate"


def rank_folder(rank: int) -> str:
    """Return the events folder of a rank, below the run folder."""
    return f"events/rank-{rank}"


class RankEvents:
    """TensorBoard events of one rank."""

    def __init__(self, run: RunFolder, rank: int, first_step: int) -> None:
        """Open a new event file; readers drop earlier events of ``first_step`` and later, left by a killed process."""
        self._writer = _writer(run.local / rank_folder(rank), first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars of a step."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


class AggregateEvents:
    """TensorBoard events of all ranks, by rank 0: one value under the rank's tag, minimum and maximum with a suffix."""

    def __init__(self, run: RunFolder, first_step: int) -> None:
        """Open a new event file (see `RankEvents`)."""
        self._writer = _writer(run.local / AGGREGATE, first_step)

    def scalars(self, step: int, by_rank: Mapping[str, Tensor], merged: Mapping[str, float]) -> None:
        """Write one value of all ranks for each tag, and the minimum and maximum over ranks.

        Args:
            step: Optimizer step.
            by_rank: Values [ranks] by tag.
            merged: The one value of all ranks by tag: the mean, or another aggregate.
        """
        for tag, values in by_rank.items():
            self._writer.add_scalar(tag, merged[tag], step)
            self._writer.add_scalar(f"{tag}_min", values.amin().item(), step)
            self._writer.add_scalar(f"{tag}_max", values.amax().item(), step)
        self._writer.flush()

    def image(self, step: int, tag: str, image: npt.NDArray[np.uint8], folder: Path) -> None:
        """Write an image [H, W, 3], also as ``<tag>-step-<n>.png`` below ``folder``."""
        self._writer.add_image(tag, image, step, dataformats="HWC")
        self._writer.flush()
        path = folder / f"{tag}-step-{step}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


class CsvLog:
    """A growing CSV whose first column is the step; resuming at a step drops the rows after it."""

    def __init__(
        self, path: Path, columns: Sequence[str], last_step: int, renamed: Mapping[str, str] | None = None
    ) -> None:
        """Open ``path`` for appending.

        Args:
            path: The file, created if absent.
            columns: Header; the first column is the step.
            last_step: Rows of later steps are removed, atomically.
            renamed: Current column names by the older names that the file may have.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        before, kept = _read_rows(path, last_step, renamed or {})
        # Values are matched by name: a version with other columns resumes the file without losing any.
        self._columns = [*columns, *(column for column in before if column not in columns)]
        rewritten = path.with_suffix(TEMPORARY_SUFFIX)
        with rewritten.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self._columns)
            writer.writerows([row.get(column, "") for column in self._columns] for row in kept)
        os.replace(rewritten, path)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)

    def row(self, values: Mapping[str, object]) -> None:
        """Append a row; columns without a value stay empty."""
        self._writer.writerow([values.get(column, "") for column in self._columns])
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _read_rows(path: Path, last_step: int, renamed: Mapping[str, str]) -> tuple[list[str], list[dict[str, str]]]:
    """Return the header of a CSV and its rows up to a step; both are empty if the file is absent."""
    if not path.exists():
        return [], []
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    header = [renamed.get(column, column) for column in header]
    # A row that was cut short by a kill has fewer fields than the header.
    whole = (row for row in rows if len(row) == len(header))
    return header, [dict(zip(header, row, strict=True)) for row in whole if int(row[0]) <= last_step]


def _writer(folder: Path, first_step: int) -> SummaryWriter:
    folder.mkdir(parents=True, exist_ok=True)
    return SummaryWriter(str(folder), purge_step=first_step)
