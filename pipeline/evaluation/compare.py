"""Comparison of two runs: differences of their fused images on the same chips."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.evaluation.evaluate import EvaluateOptions, Job, run_job
from pipeline.evaluation.intervals import METHOD, Estimate
from pipeline.evaluation.result import COLUMNS, FUSED, Evaluation, better, paired
from sharding.errors import UserError


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same chips."""

    first: Evaluation
    """Evaluation of the first run."""
    second: Evaluation
    """Evaluation of the second run."""
    names: tuple[str, str]
    """Run folders."""

    def difference(self, column: str) -> Estimate:
        """Return the mean of the second minus the first on each chip, with its interval over AOIs."""
        own, other = ([row for row in result.chips if row["method"] == FUSED] for result in (self.second, self.first))
        return paired(own, other, column)

    def verdict(self, column: str) -> str:
        """Return which run is better: ``second``, ``first``, or ``undecided`` if the interval holds zero."""
        found = self.difference(column)
        if not found.excludes_zero:
            return "undecided"
        return "second" if better(column, found.mean) else "first"

    def table(self) -> str:
        """Return the table that the command prints: a line per column."""
        lines = [
            *(f"{place} {name}, checkpoint {result.checkpoint}" for place, name, result in self._sides()),
            f"split {self.first.split} of {self.first.dataset}, fused images, differences second - first on the same"
            f" chips; intervals of 95 %, {METHOD}",
            f"{'':18}{'first':>10}{'second':>10}  difference, interval, better",
        ]
        means = [result.means(FUSED) for result in (self.first, self.second)]
        for column in COLUMNS:
            own, other = (mean[column] for mean in means)
            lines.append(f"{column:18}{own:>10.4g}{other:>10.4g}  {self.difference(column)} {self.verdict(column)}")
        return "\n".join(lines)

    def _sides(self) -> list[tuple[str, str, Evaluation]]:
        return [("first:", self.names[0], self.first), ("second:", self.names[1], self.second)]


def comparison_jobs(
    uris: tuple[str, str], split: str, which: str, *, data_uri: str, output: str, options: EvaluateOptions
) -> list[Job]:
    """Load two runs and open the split; arguments as of `run_job`. Below ``output`` each run has a folder, 1 and 2.

    Raises:
        UserError: The runs have other datasets or simulate their revisits in other ways.
    """
    first, second = (
        run_job(uri, split, which, data_uri=data_uri, output=_below(output, number), options=options)
        for number, uri in enumerate(uris, start=1)
    )
    for what, own, other, remedy in (
        ("the dataset", first.dataset.index.digest, second.dataset.index.digest, "give one dataset with --data"),
        ("simulated revisits", first.dataset.simulation, second.dataset.simulation, "compare runs with the same"),
        ("revisits", first.dataset.revisits, second.dataset.revisits, "compare runs with the same number"),
    ):
        if own != other:
            raise UserError(
                f"--compare {uris[0]} {uris[1]} cannot pair chips: {what} of the first is {_short(own)}, of the second"
                f" {_short(other)}: {remedy}"
            )
    return [first, second]


def _below(output: str, number: int) -> str:
    return f"{output.rstrip('/')}/{number}" if output else ""


def _short(value: object) -> str:
    return str(value)[:12]
