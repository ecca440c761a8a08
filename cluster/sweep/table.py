"""Table of a sweep: a row for each pair of encoder and head, with the mean and the spread over its seeds."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.sweep.cell import Result
from pipeline.config import RunConfig

SHOWN = ("psnr", "ssim", "sam", "ergas")
"""Metrics of the Markdown table; the CSV has all, raw and adjusted."""
PAGE_START = "# Sweep\n\nMeans over the seeds of the best checkpoints"
"""First words of each page, by which it is recognised."""
_COLUMNS = ("encoder", "head", "parameters", "flops", "runs", "done")
TABLE_START = f"{','.join(_COLUMNS)},"
"""First columns of each table, by which it is recognised."""
_MEGA, _GIGA = 1e6, 1e9


@dataclass(frozen=True)
class Row:
    """One pair."""

    pair: str
    """``ENCODER+HEAD``."""
    results: Sequence[Result]
    """Figures of its runs that are done."""
    planned: int
    """Number of its runs."""

    def values(self, metric: str) -> list[float]:
        """Return the finite figures of its runs."""
        return [value for result in self.results if (value := result.figures.get(metric)) is not None]

    @property
    def seconds(self) -> list[float]:
        """Return the training time of its runs."""
        return [result.seconds for result in self.results]


def rows(cells: Sequence[RunConfig], results: Mapping[str, Result]) -> list[Row]:
    """Return a row for each pair, in the order of the plan.

    Args:
        cells: Configurations of all runs.
        results: Figures of the runs that are done, by run folder.
    """
    pairs: dict[str, list[RunConfig]] = {}
    for cell in cells:
        pairs.setdefault(f"{cell.model.encoder}+{cell.model.head}", []).append(cell)
    return [
        Row(pair, [results[one.output.uri] for one in runs if one.output.uri in results], len(runs))
        for pair, runs in pairs.items()
    ]


def as_csv(table: Sequence[Row]) -> str:
    """Return the table as CSV; an absent figure is an empty cell."""
    metrics = list(dict.fromkeys(name for row in table for result in row.results for name in result.figures))
    baselines = _baselines(table)
    columns = [f"{name}_{what}" for name in (*metrics, "seconds") for what in ("mean", "spread")]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*_COLUMNS, *columns])
    for row in table:
        cost = [row.results[0].parameters, row.results[0].flops] if row.results else ["", ""]
        figures = [value for name in metrics for value in _mean_and_spread(row.values(name))]
        writer.writerow(
            [*row.pair.split("+"), *cost, row.planned, len(row.results), *figures, *_mean_and_spread(row.seconds)]
        )
    for method, found in baselines.items():
        figures = [value for name in metrics for value in _mean_and_spread(_known(found, name))]
        writer.writerow([method, "", 0, "", "", "", *figures, "", ""])
    return text.getvalue()


def as_markdown(table: Sequence[Row], cells: Sequence[RunConfig], split: str, failed: Mapping[str, str]) -> str:
    """Return the page of a sweep: the table, then a link to each run.

    Args:
        table: Its rows.
        cells: Configurations of all runs.
        split: Split of the figures.
        failed: Reasons of the runs that failed, by run folder.
    """
    place = cells[0].output.uri.rsplit("/", 2)[0]
    lines = [
        f"{PAGE_START} on the split `{split}`, ± the standard deviation where a pair has several runs."
        " PSNR in dB, SAM in degrees, ERGAS in percent, all raw; the CSV beside this page has the"
        " adjusted ones too. The time is that of the training steps.",
        "",
        f"| model | runs | parameters, M | GFLOP a chip | {' | '.join(name.upper() for name in SHOWN)} | time, s |",
        "|---|" + "---:|" * (4 + len(SHOWN)),
    ]
    for row in table:
        cost = ["-", "-"]
        if row.results:
            cost = [f"{row.results[0].parameters / _MEGA:.3f}", f"{row.results[0].flops / _GIGA:.2f}"]
        done = str(row.planned) if len(row.results) == row.planned else f"{len(row.results)} of {row.planned}"
        figures = [_with_spread(row.values(name)) for name in SHOWN]
        lines.append(f"| {' | '.join([row.pair, done, *cost, *figures, _with_spread(row.seconds)])} |")
    for method, found in _baselines(table).items():
        figures = [_with_spread(_known(found, name)) for name in SHOWN]
        lines.append(f"| {' | '.join([method, '-', '0', '-', *figures, '-'])} |")
    lines += ["", "Runs:", "", *_links(cells, failed), "", f"Curves: `satfusion monitor {place}`", ""]
    return "\n".join(lines)


def _baselines(table: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """Return the figures of the methods that learn nothing; those of all runs are the same."""
    return next((result.baselines for row in table for result in row.results if result.baselines), {})


def _known(figures: Mapping[str, float | None], metric: str) -> list[float]:
    value = figures.get(metric)
    return [] if value is None else [value]


def _links(cells: Sequence[RunConfig], failed: Mapping[str, str]) -> Iterator[str]:
    for cell in cells:
        uri = cell.output.uri
        below = "/".join(uri.rsplit("/", 2)[1:])
        # Relative, so that the page can be read wherever the sweep is copied to.
        yield f"- [{below}]({below}/)" + (f": failed: {_plain(failed[uri])}" if uri in failed else "")


def _plain(text: str) -> str:
    """Return a text as one line of Markdown without markup: it may hold what somebody else has written."""
    return re.sub(r"[\\`*\[\]<>]", r"\\\g<0>", " ".join(text.split()))


def _mean_and_spread(values: Sequence[float]) -> tuple[float | str, float | str]:
    """Return the mean and the sample standard deviation; empty texts where there is none."""
    mean = statistics.fmean(values) if values else ""
    return mean, statistics.stdev(values) if len(values) > 1 else ""


def _with_spread(values: Sequence[float]) -> str:
    mean, spread = _mean_and_spread(values)
    if mean == "":
        return "-"
    return f"{mean:.4g}" if spread == "" else f"{mean:.4g} ± {spread:.2g}"
