"""Typed options of `shard`, from its command line or from the file of a job on a cluster."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar

from msgspec import Meta

from sharding.arguments import check_values
from sharding.errors import UserError
from sharding.files import read_text
from sharding.names import absolute_uri, check_uri, local_path
from sharding.prepare.options import SampleOptions
from sharding.run.plan import PlanOptions
from sharding.run.workers import MOST_WORKERS
from sharding.schema import JobFile
from sharding.sources.options import SourceOptions
from sharding.storage import StorageOptions


def _read_names(path: str) -> tuple[str, ...]:
    """Read the AOIs that a file names, one per line; quotes and separators of a spreadsheet are dropped."""
    lines = read_text("--aois", local_path("--aois", path)).splitlines()
    names = tuple(name for line in lines if (name := line.strip().rstrip(",;").strip().strip("\"'").strip()))
    if not names:
        raise UserError(f"--aois {path} names no AOI: give a text file with an AOI a line")
    return names


@dataclass(frozen=True)
class ShardOptions:
    """Options of a dataset. The same source and options give the same bytes."""

    sample: SampleOptions = field(default_factory=SampleOptions)
    """Options of a sample."""

    plan: PlanOptions = field(default_factory=PlanOptions)
    """Options of splits and shards."""

    source: SourceOptions = field(default_factory=SourceOptions)
    """Options of the source."""

    aois: tuple[str, ...] | None = field(default=None, metadata={"metavar": "FILE", "parse": _read_names})
    """Use only the AOIs that FILE names, one per line. None uses all."""

    strict: bool = False
    """Refuse an input with an unusable AOI. Otherwise the AOI is skipped."""

    def __post_init__(self) -> None:
        if self.source.source != "worldstrat":  # images of other sources are cut into tiles, never resized
            object.__setattr__(self, "sample", self.source.without_sizes(self.sample))


@dataclass(frozen=True)
class ShardJob(JobFile):
    """One run of `shard`."""

    verb: ClassVar[str] = "shard"
    """The verb."""

    input: Path = field(metadata={"metavar": "DIR"})
    """Folder of the source: hr_dataset/ and lr_dataset/ or their zips, a scenes.toml, or HDF5 files."""

    output: str = field(metadata={"metavar": "URI"})
    """Local folder or s3://BUCKET/PREFIX."""

    options: ShardOptions = field(default_factory=ShardOptions)
    """Options of the dataset."""

    storage: StorageOptions = field(default_factory=StorageOptions)
    """Options of objects written to S3."""

    workers: Annotated[int, Meta(ge=1, le=MOST_WORKERS)] | None = None
    """Shards built in parallel; by default one per CPU, at most 8, and on a Ray cluster as many as fit."""

    overwrite: bool = False
    """Replace a dataset of another source or other options in --output; runs that read it can finish."""

    prune: bool = False
    """Remove the files of earlier datasets in --output at the end."""

    report: Path | None = field(default=None, metadata={"metavar": "FILE"})
    """Write a report of the run as JSON. None writes nothing."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: For an invalid value; it names the option, the value and the valid range.
        """
        check_values(self)
        check_uri("--output", self.output)

    def with_absolute_paths(self, folder: Path) -> ShardJob:
        """Return a copy with relative local paths resolved from ``folder``, for a process in another folder."""
        return replace(
            self,
            input=folder / self.input,
            output=absolute_uri(self.output, folder),
            report=folder / self.report if self.report else None,
        )
