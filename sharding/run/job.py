"""All that `shard` is asked for, as typed options: from its command line, or from the file of a job on a cluster."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from sharding.arguments import from_table
from sharding.errors import UserError
from sharding.prepare.options import SampleOptions
from sharding.run.plan import PlanOptions
from sharding.storage import StorageOptions
from sharding.storage.names import expanded


def _read_names(path: str) -> tuple[str, ...]:
    """Read the AOIs that a file names, one a line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--aois {path} cannot be read ({error}): give a text file with an AOI a line") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise UserError(f"--aois {path} names no AOI: give a text file with an AOI a line")
    return names


@dataclass(frozen=True)
class ShardOptions:
    """How a source becomes a dataset. The same source and options give the same bytes."""

    sample: SampleOptions = field(default_factory=SampleOptions)
    """What a sample is made of."""

    plan: PlanOptions = field(default_factory=PlanOptions)
    """How samples are shared out."""

    aois: tuple[str, ...] | None = field(default=None, metadata={"metavar": "FILE", "parse": _read_names})
    """Take only these AOIs, which FILE names, one a line. None takes all."""

    strict: bool = False
    """Refuse an input with an unusable AOI. Otherwise the AOI is left out."""


@dataclass(frozen=True)
class ShardJob:
    """One run of `shard`."""

    input: Path = field(metadata={"metavar": "DIR"})
    """Folder that holds hr_dataset/ and lr_dataset/, or their zips."""

    output: str = field(metadata={"metavar": "URI"})
    """Local folder or s3://BUCKET/PREFIX."""

    options: ShardOptions = field(default_factory=ShardOptions)
    """How the source becomes a dataset."""

    storage: StorageOptions = field(default_factory=StorageOptions)
    """How objects are stored in S3."""

    workers: int | None = None
    """Shards built side by side; by default one per CPU, at most 8, and on a Ray cluster as many as fit."""

    overwrite: bool = False
    """Replace a dataset of another source or other options in --output."""

    report: Path | None = field(default=None, metadata={"metavar": "FILE"})
    """Write what was done as JSON. None writes nothing."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: naming the option, its value and the least it may be.
        """
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers {self.workers} is too small: the least is 1")

    def with_absolute_paths(self, folder: Path) -> ShardJob:
        """Return it with relative local paths taken from ``folder``, for a process that works in another one."""
        return replace(
            self,
            input=folder / self.input,
            output=self.output if "://" in self.output else str(folder / expanded(self.output)),
            report=folder / self.report if self.report else None,
        )

    def to_json(self) -> str:
        """Return it as JSON that `from_json` reads back unchanged."""
        return json.dumps(asdict(self), indent=1, default=str)

    @classmethod
    def from_json(cls, text: str) -> ShardJob:
        """Read what `to_json` wrote.

        Raises:
            UserError: naming a key that is no option.
        """
        return from_table(cls, json.loads(text))
