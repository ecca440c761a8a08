"""Options of a sweep; this module imports nothing slow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from sharding.arguments import check_values
from sharding.errors import UserError

ALL = "all"
"""Word for every encoder, or every head."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@dataclass(frozen=True)
class SweepOptions:
    """Options of a sweep."""

    encoders: tuple[str, ...] = field(metadata={"metavar": "NAME,NAME", "parse": _names})
    """Encoders by name with commas between them, or ``all``; ``none`` trains heads alone."""
    heads: tuple[str, ...] = field(metadata={"metavar": "NAME,NAME", "parse": _names})
    """Heads by name with commas between them, or ``all``; ``none`` trains encoders alone."""
    seeds: Annotated[int, Meta(ge=1, le=1000)] = 1
    """Runs of each pair: with the seed of the configuration and those that follow it."""
    split: Literal["test", "val", "train"] = "test"
    """Split of the figures in the table."""
    cpus_per_run: Annotated[float, Meta(gt=0, le=10_000)] = field(default=1.0, metadata={"metavar": "C"})
    """CPUs that Ray reserves for each run, which is one process; as many runs as fit are trained at once."""
    gpus_per_run: Annotated[float, Meta(ge=0, le=1000)] = field(default=0.0, metadata={"metavar": "G"})
    """GPUs that Ray reserves for each run; a part such as 0.5 lets several runs share one."""
    parallel: Annotated[int, Meta(ge=1, le=1000)] = 1
    """Runs at once on this machine, without a cluster."""

    def __post_init__(self) -> None:
        check_values(self)
        for option, names in (("--encoders", self.encoders), ("--heads", self.heads)):
            if not names:
                raise UserError(f"{option} names nothing: give names of `satfusion models`, or {ALL}")

    @property
    def resources(self) -> dict[str, float]:
        """Return the resources that Ray reserves for each run."""
        gpus = {"GPU": self.gpus_per_run} if self.gpus_per_run else {}
        return {"CPU": self.cpus_per_run, **gpus}
