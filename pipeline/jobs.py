"""Jobs: the options of `evaluate` and `predict`, from the command line or from the file of a job on a cluster."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from msgspec import Meta

from sharding.arguments import check_values
from sharding.errors import UserError
from sharding.names import absolute_uri
from sharding.schema import JobFile

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class WeightsJob(JobFile):
    """Options that say which weights a job uses: those of a run, or of a published file."""

    verb: ClassVar[str]
    """The verb."""
    places: ClassVar[tuple[str, ...]]
    """Names of the fields that are URIs."""

    run_uri: str | None = None
    """Run folder, local or s3://."""
    checkpoint: str | None = None
    """``best``, ``last`` or a step; None for ``best``."""
    published_checkpoint: Path | None = None
    """Weights of the published code, instead of a run."""
    model: str | None = None
    """Model of that file, ``ENCODER+HEAD``."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: For an invalid value, or options that exclude each other.
        """
        check_values(self)
        if self.published_checkpoint is None:
            return
        if self.run_uri is not None or self.checkpoint is not None:
            given = "--checkpoint" if self.run_uri is None else f"RUN {self.run_uri}"
            raise UserError(f"{given} and --published-checkpoint exclude each other: a published file is not a run")
        if self.model is None:
            raise UserError("--published-checkpoint needs --model ENCODER+HEAD")

    def with_absolute_paths(self, folder: Path) -> Self:
        """Return a copy with relative local paths resolved from ``folder``, for a process in another folder."""
        changes: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Path):
                changes[item.name] = folder / value
            elif value and item.name in self.places:
                several = isinstance(value, tuple)
                found = tuple(absolute_uri(uri, folder) for uri in (value if several else (value,)))
                changes[item.name] = found if several else found[0]
        return replace(self, **changes)


@dataclass(frozen=True)
class EvaluateJob(WeightsJob):
    """One run of `evaluate`."""

    verb = "evaluate"
    places = ("run_uri", "data", "output", "compare")

    split: Split = "test"
    """Split of the dataset."""
    data: str = ""
    """Dataset to evaluate on; empty for the run's own."""
    output: str | None = None
    """Folder of the results; None for the run folder, or ``evaluation`` for a published file."""
    simulate: Literal["off", "shifts", "sensor"] | None = None
    """Mode of simulating revisits from the target, for a published file."""
    registration: Literal["centred", "published"] = "centred"
    """Mode of registering predictions to the target."""
    panels: Annotated[int, Meta(ge=0, le=10**6)] = 9
    """Chips drawn as PNG."""
    compare: tuple[str, str] | None = None
    """Two runs that are compared on the same chips."""
    perturb: tuple[Literal["noise", "blur", "shift", "revisits"], ...] = ()
    """Kinds of perturbations that are scored too."""
    classes: Path | None = None
    """WorldStrat's split file, to score by land-cover class."""
    report: Path | None = None
    """Page of the report."""

    def __post_init__(self) -> None:
        """Check the values; give a published file's results their folder.

        Raises:
            UserError: For an invalid value, or options that exclude each other.
        """
        if self.compare is not None:
            self._check_comparison()
        super().__post_init__()
        if self.compare is not None:
            return
        if self.published_checkpoint is not None:
            if not self.data:
                raise UserError("--published-checkpoint needs --data URI")
            object.__setattr__(self, "output", self.output or "evaluation")
            return
        if self.run_uri is None:
            raise UserError("evaluate needs the run folder RUN, or --published-checkpoint FILE, or --compare RUN RUN")
        for option in ("model", "simulate"):
            if getattr(self, option) is not None:
                raise UserError(f"--{option} is only for --published-checkpoint: a run has its own")

    def _check_comparison(self) -> None:
        for name, value in (("RUN", self.run_uri), ("--published-checkpoint", self.published_checkpoint)):
            if value is not None:
                raise UserError(f"--compare names both runs: drop {name} {value}")
        for name in ("model", "simulate", "perturb"):
            if getattr(self, name):
                raise UserError(f"--{name} has no part in a comparison of two runs: drop it")


@dataclass(frozen=True)
class PredictJob(WeightsJob):
    """One run of `predict`."""

    verb = "predict"
    places = ("run_uri", "input", "output")

    input: str = ""
    """Folder, description or dataset of the scenes."""
    output: str = ""
    """Folder of the outputs."""
    weights: Literal["raw", "ema"] | None = None
    """Weights of a run as trained, or their moving average; None for those as trained."""
    aoi: tuple[str, ...] = ()
    """Names of the AOIs; empty for all."""
    split: Split | None = None
    """Split of a dataset; None for all."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the computation."""
    pixels: Literal["uint16", "float32"] = "uint16"
    """Type of the pixels."""
    overwrite: bool = False
    """Replace outputs of other weights or inputs."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: For an invalid value, or options that exclude each other.
        """
        super().__post_init__()
        if self.published_checkpoint is not None:
            if self.weights is not None:
                raise UserError("--weights is only for a RUN: a published file holds one set of weights")
            return
        if self.run_uri is None:
            raise UserError("predict needs the run folder RUN, or --published-checkpoint FILE")
        if self.model is not None:
            raise UserError("--model is only for --published-checkpoint: a run has its own")
