"""Training output: TensorBoard events of each rank and of all ranks together, metrics.csv, batches.csv."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb

from pipeline.reporting.run_folder import TEMPORARY_SUFFIX, RunFolder
from pipeline.reporting.segments import EventFile

if TYPE_CHECKING:  # slow to import, and the monitor needs the names alone
    from torch import Tensor

AGGREGATE = "events/aggregate"


def rank_folder(rank: int) -> str:
    """Return the events folder of a rank, below the run folder."""
    return f"events/rank-{rank}"


class RankEvents:
    """TensorBoard events of one rank."""

    def __init__(self, run: RunFolder, rank: int, first_step: int) -> None:
        """Open a new event file; readers drop earlier events of ``first_step`` and later, left by a killed process."""
        self._file = _event_file(run, rank_folder(rank), first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars of a step."""
        self._file.add(step, _scalars(values))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class AggregateEvents:
    """TensorBoard events of all ranks, by rank 0: one value under the rank's tag, others with a suffix.

    These are ``_min`` and ``_max`` over the ranks, and for times ``_p95``, the 95th percentile.
    """

    def __init__(self, run: RunFolder, first_step: int) -> None:
        """Open a new event file (see `RankEvents`)."""
        self._file = _event_file(run, AGGREGATE, first_step)

    def scalars(self, step: int, by_rank: Mapping[str, Tensor], merged: Mapping[str, float]) -> None:
        """Write one value of all ranks for each tag, and its spread over ranks.

        Args:
            step: Optimizer step.
            by_rank: Values [ranks] by tag.
            merged: The one value of all ranks by tag: the mean, or another aggregate.
        """
        values: dict[str, float] = {}
        for tag, ranks in by_rank.items():
            values |= {tag: merged[tag], f"{tag}_min": ranks.amin().item(), f"{tag}_max": ranks.amax().item()}
            if tag.startswith("time/"):
                values[f"{tag}_p95"] = ranks.double().quantile(0.95).item()
        self._file.add(step, _scalars(values))

    def text(self, step: int, text: str, tag: str) -> None:
        """Write a text in Markdown."""
        self._file.add(step, text_pb(tag, text))

    def image(self, step: int, tag: str, image: npt.NDArray[np.uint8], folder: Path) -> None:
        """Write an image [H, W, 3], also as ``<tag>-step-<n>.png`` below ``folder``."""
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        height, width, channels = image.shape
        shown = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png.getvalue())
        self._file.add(step, Summary(value=[Summary.Value(tag=tag, image=shown)]))
        path = folder / f"{tag}-step-{step}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(TEMPORARY_SUFFIX)  # a full disk leaves no half image
        beside.write_bytes(png.getvalue())
        os.replace(beside, path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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


def _event_file(run: RunFolder, folder: str, first_step: int) -> EventFile:
    file = EventFile(run.local / folder, first_step, segmented=run.uploads)
    run.before_upload(file.settle)
    return file


def _scalars(values: Mapping[str, float]) -> Summary:
    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
