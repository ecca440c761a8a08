"""Result of an evaluation: its rows, their means with intervals, by groups of AOIs, as text and as CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.evaluation.baselines import BASELINES
from pipeline.evaluation.intervals import METHOD, Estimate, estimate
from pipeline.evaluation.perturb import UNITS, Kind
from pipeline.quality import opensr
from pipeline.quality.names import ADJUSTED, METRICS
from pipeline.quality.no_reference import MEASURES
from pipeline.quality.registration import Mode
from sharding.errors import UserError
from sharding.storage import Storage

FUSED, AVERAGED = "fused", "fused_ema"
"""Methods of the weights, and of their moving average if the run keeps one (``train.ema``)."""
COMPARED = tuple(name + suffix for suffix in ("", ADJUSTED) for name in METRICS)
"""Columns that compare with the target."""
COLUMNS = (*COMPARED, *MEASURES, *opensr.MEASURES)

HIGHER_IS_BETTER = {"psnr", "ssim", "psnr_adjusted", "ssim_adjusted", "hqnr", "improvement"}
"""Columns of quality; all others are errors."""

AGREEMENTS = (0.5, 0.7, 0.9)
"""Bounds of the groups of AOIs by the agreement of their revisits with the target."""

STARTS = {
    "chips.csv": b"aoi,chip,",
    "aois.csv": b"aoi,method,",
    "groups.csv": b"kind,group,",
    "perturbed.csv": b"aoi,chip,",
    "table.txt": b"split ",
}
"""First bytes of each file of results, by which an earlier evaluation's is recognised."""
_PANEL = re.compile(r"panel-\d+\.png")

Row = dict[str, object]


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one checkpoint on one split."""

    checkpoint: str
    """Folder name of the checkpoint."""
    split: str
    """``train``, ``val`` or ``test``."""
    simulation: str
    """Mode of simulating revisits from the target, or ``off``."""
    registration: Mode
    """Mode of registering predictions to the target."""
    chips: list[Row]
    """A row per chip and method: ``aoi chip method agreement``, ``place`` (the AOI's name in its own dataset) of a mix,
    ``class`` where classes are known, and COLUMNS; None is an offset where nothing correlates."""
    methods: tuple[str, ...]
    """Methods in the order of the table: the fused images, then BASELINES and PANSHARPENED."""
    folder: str
    """Folder of the CSVs and panels."""
    dataset: str = ""
    """URI of the dataset."""
    digest: str = ""
    """Digest of its index."""
    trained: bool = True
    """Whether the weights were trained on this dataset."""
    skipped: int = 0
    """Number of chips that are quarantined."""
    perturbed: list[Row] = field(default_factory=list)
    """A row per chip, kind, level and method: ``perturbation level`` and those of ``chips``, with COMPARED."""

    def means(self, method: str) -> dict[str, float]:
        """Return the mean of every column over the chips, for one method; chips without a value are left out."""
        rows = [row for row in self.chips if row["method"] == method]
        return {column: mean([row[column] for row in rows]) for column in COLUMNS}

    def margin(self, column: str) -> tuple[float, float]:
        """Return the mean of ``column`` for the fused image and for the better of BASELINES (higher is better)."""
        return self.means(FUSED)[column], max(self.means(method)[column] for method in BASELINES)

    def estimate(self, method: str, column: str) -> Estimate:
        """Return the mean of a column for one method, with its interval."""
        return estimate_rows([row for row in self.chips if row["method"] == method], column)

    def difference(self, column: str, method: str, other: str) -> Estimate:
        """Return the mean difference of two methods on the same chips, with its interval."""
        first, second = ([row for row in self.chips if row["method"] == name] for name in (method, other))
        return paired(first, second, column)

    def groups(self) -> dict[str, dict[str, list[Row]]]:
        """Return the rows by ``agreement`` and, where it is known, by ``class``: by kind, then by name of the group."""
        found: dict[str, dict[str, list[Row]]] = {"agreement": {}}
        if any("class" in row for row in self.chips):
            found["class"] = {}
        for row in self.chips:
            found["agreement"].setdefault(_agreement(row["agreement"]), []).append(row)
            if "class" in row:
                found["class"].setdefault(str(row["class"]), []).append(row)
        return {kind: dict(sorted(groups.items())) for kind, groups in found.items()}

    def curves(self) -> dict[Kind, dict[str, dict[float, list[Row]]]]:
        """Return the rows of perturbed inputs by kind, method and level."""
        found: dict[Kind, dict[str, dict[float, list[Row]]]] = {}
        for row in self.perturbed:
            kind, method, level = row["perturbation"], str(row["method"]), row["level"]
            assert kind in UNITS
            assert isinstance(level, float)
            found.setdefault(kind, {}).setdefault(method, {}).setdefault(level, []).append(row)
        return found

    def table(self) -> str:
        """Return the table that the command prints: a line per method, raw then adjusted, then without target."""
        lines = [
            f"split {self.split}, checkpoint {self.checkpoint}, {self.registration} registration,"
            f"{'' if self.simulation == 'off' else f' simulated revisits ({self.simulation}),'}"
            f" {len(self.chips) // len(self.methods)} chips",
            f"{'':18}" + "".join(f"{name:>10}" for name in (*METRICS, *(f"{name}*" for name in METRICS))),
        ]
        means = {method: self.means(method) for method in self.methods}
        for method in self.methods:
            lines.append(f"{method:18}" + "".join(f"{means[method][column]:>10.4g}" for column in COMPARED))
        lines.append("* after bias adjustment to the truth's band means; psnr in dB, sam in degrees, ergas in percent")
        for title, columns in (("without target", MEASURES), ("as opensr-test", opensr.MEASURES)):
            lines.append(f"{title:18}" + "".join(f"{name:>14}" for name in columns))
            for method in self.methods:
                lines.append(f"{method:18}" + "".join(f"{means[method][column]:>14.4g}" for column in columns))
        lines.append(f"intervals of 95 %, {METHOD}:")
        for method in self.methods:
            cells = (f"{name} {self.estimate(method, name)}" for name in ("psnr", "ssim", "sam", "ergas"))
            lines.append(f"{method:18}" + ", ".join(cells))
        return "\n".join([*lines, *self._group_lines(), *self._curve_lines()])

    def _group_lines(self) -> list[str]:
        lines = []
        for kind, groups in self.groups().items():
            for name, rows in groups.items():
                cells = (
                    f"{method} {estimate_rows([row for row in rows if row['method'] == method], 'psnr')}"
                    for method in (FUSED, BASELINES[1])
                )
                aois = len({place_of(row) for row in rows})
                lines.append(f"{kind} {name}, {aois} AOIs: psnr of {', '.join(cells)}")
        return lines

    def _curve_lines(self) -> list[str]:
        return [
            f"{kind} ({UNITS[kind]}): psnr of {method} "
            + ", ".join(f"{mean([row['psnr'] for row in rows]):.4g} at {level:g}" for level, rows in points.items())
            for kind, methods in self.curves().items()
            for method, points in methods.items()
        ]

    def write(self, folder: Storage, panels: Iterable[tuple[str, bytes]], earlier: Iterable[str]) -> None:
        """Write ``chips.csv aois.csv groups.csv``, panels, and ``perturbed.csv`` if inputs were perturbed.

        ``table.txt`` goes first and comes last, so that results with it are those of one evaluation.

        Args:
            folder: The folder.
            panels: Name and PNG of each panel.
            earlier: Names of the results of an earlier evaluation (`earlier_results`), which are removed.
        """
        folder.delete("table.txt")
        folder.write("chips.csv", _csv(self.chips))
        for name in earlier:
            if name != "chips.csv":  # by it the next evaluation knows the panels
                folder.delete(name)
        folder.write("aois.csv", _csv(self._by_aoi()))
        folder.write("groups.csv", _csv(self._by_group()))
        if self.perturbed:
            folder.write("perturbed.csv", _csv(self.perturbed))
        for name, picture in panels:
            folder.write(name, picture)
        folder.write("table.txt", self.table().encode())

    def _by_aoi(self) -> list[Row]:
        rows: dict[tuple[object, object], list[Row]] = {}
        for row in self.chips:
            rows.setdefault((row["aoi"], row["method"]), []).append(row)
        return [
            {"aoi": aoi, "method": method, "chips": len(own)}
            | {name: own[0][name] for name in ("agreement", "class") if name in own[0]}
            | {column: mean([row[column] for row in own]) for column in COLUMNS}
            for (aoi, method), own in rows.items()
        ]

    def _by_group(self) -> list[Row]:
        """Return a row per kind of group, group, method and column, and of all AOIs as the kind ``all``."""
        table: list[Row] = []
        for kind, groups in {"all": {"": self.chips}, **self.groups()}.items():
            for name, rows in groups.items():
                for method in self.methods:
                    own = [row for row in rows if row["method"] == method]
                    for column in COLUMNS:
                        found = estimate_rows(own, column)
                        place = {"kind": kind, "group": name, "aois": found.aois, "method": method, "column": column}
                        table.append(place | {"mean": found.mean, "low": found.low, "high": found.high})
        return table


def earlier_results(folder: Storage) -> list[str]:
    """Return the names of the results of an earlier evaluation in a folder.

    Raises:
        UserError: A file of such a name is not of an evaluation.
    """
    found = {item.key: item.size for item in folder.list() if item.key in STARTS or _PANEL.fullmatch(item.key)}
    for name, size in found.items():
        if name in STARTS:
            start = STARTS[name]
            is_ours = size > 0 and folder.read_range(name, 0, len(start)) == start
        else:
            is_ours = "chips.csv" in found  # a panel says nothing of itself
        if not is_ours:
            raise UserError(
                f"{folder.uri} holds {name!r}, which no evaluation wrote: nothing was changed; move it away, or give"
                " another --output"
            )
    return list(found)


def mean(values: Sequence[object]) -> float:
    """Return the mean of the values that are numbers; NaN if there is none."""
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[~np.isnan(numbers)]
    return float(numbers.mean()) if numbers.size else math.nan


def estimate_rows(rows: Iterable[Row], column: str) -> Estimate:
    """Return the mean of a column over rows, with its interval over their AOIs."""
    return _estimate((place_of(row), row[column]) for row in rows)


def paired(rows: Iterable[Row], others: Iterable[Row], column: str) -> Estimate:
    """Return the mean of the differences of rows of the same AOI and chip, with its interval over AOIs.

    Raises:
        ValueError: A chip is in one of them only.
    """
    first, second = ({(row["aoi"], row["chip"]): row for row in of} for of in (rows, others))
    if first.keys() != second.keys():
        raise ValueError(f"chips differ: {sorted(map(str, first.keys() ^ second.keys()))[:3]}")
    return _estimate(
        (place_of(row), _number(row[column]) - _number(second[chip][column])) for chip, row in first.items()
    )


def place_of(row: Row) -> object:
    """Return the place that a row is of: AOIs of one name in the datasets of a mix are drawn as one."""
    return row.get("place", row["aoi"])


def better(column: str, difference: float) -> bool:
    """Return whether a difference of this column is a gain."""
    return difference > 0 if column in HIGHER_IS_BETTER else difference < 0


def _estimate(values: Iterable[tuple[object, object]]) -> Estimate:
    by_aoi: dict[object, list[float]] = {}
    for aoi, value in values:
        number = _number(value)
        if not math.isnan(number):
            by_aoi.setdefault(aoi, []).append(number)
    if not by_aoi:
        return Estimate(math.nan, math.nan, math.nan, 0)
    sums, counts = ([function(own) for own in by_aoi.values()] for function in (sum, len))
    return estimate(np.array(sums, np.float64), np.array(counts, np.float64))


def _number(value: object) -> float:
    """Return a value of a row as a number; NaN for none."""
    if value is None:
        return math.nan
    assert isinstance(value, int | float)
    return value


def _agreement(value: object) -> str:
    """Return the name of the group that an agreement is in."""
    if value is None:
        return "unknown"
    bounds = (-1, *AGREEMENTS, 1)
    place = int(np.searchsorted(AGREEMENTS, _number(value), side="right"))
    return f"{bounds[place]:g} to {bounds[place + 1]:g}"


def _csv(rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
