"""Report of an evaluation as one HTML file that needs nothing else: no script, no network, no other file."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape

from pipeline.evaluation.baselines import BASELINES
from pipeline.evaluation.charts import curves, distributions
from pipeline.evaluation.compare import Comparison
from pipeline.evaluation.intervals import LEAST, METHOD, Estimate
from pipeline.evaluation.perturb import UNITS
from pipeline.evaluation.result import (
    COLUMNS,
    FUSED,
    HIGHER_IS_BETTER,
    Evaluation,
    Row,
    better,
    estimate_rows,
    place_of,
)
from pipeline.quality import opensr
from pipeline.quality.names import ADJUSTED, METRICS
from pipeline.quality.no_reference import MEASURES
from sharding.run.named_file import PAGE_START

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; margin: .8em 0; display: block; overflow-x: auto }
th, td { padding: .25em .7em; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child { text-align: left } td.best { font-weight: 700 } small { color: #666 }
td small { display: block } figure { margin: 1em 0 } img, svg { max-width: 100%; height: auto }
svg { font: 12px system-ui, sans-serif; margin-right: 1em }
"""

TITLES = {
    "mse": "MSE",
    "mae": "MAE, reflectance",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "sam": "SAM, degrees",
    "ergas": "ERGAS, percent",
    "d_lambda": "D_lambda",
    "d_s": "D_s",
    "hqnr": "HQNR",
    "pan_offset": "offset to PAN, px",
    "lr_offset": "offset to revisits, px",
    "reflectance": "reflectance, L1",
    "spectral": "spectral, degrees",
    "improvement": "improvement",
    "omission": "omission",
    "hallucination": "hallucination",
}
"""Headings of columns; others are headed by their name."""
DRAWN = ("psnr", "ssim", "sam", "ergas", "hqnr")
"""Columns whose distributions are drawn."""
FEW = 30
"""AOIs below which the report warns of wide intervals."""
LOW_AGREEMENT = 0.5
FAR = 1.0
"""Median offset, high-resolution pixels, above which the report warns."""

UNMOVED = 0.05
"""Change of PSNR over all levels of a perturbation, dB, below which the report says that revisits have no part."""

Picture = Callable[[Row], bytes]
"""Function that draws the chip of a row as PNG."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    """Its text."""
    small: str = ""
    """Text below, in small print."""
    best: bool = False
    """Whether it is the best of its column."""


Line = list[Cell | str]
"""A line of a table; a string is a cell of that text."""


def evaluation_page(result: Evaluation, picture: Picture) -> bytes:
    """Return the report of one evaluation; ``picture`` draws the chip of a row as PNG."""
    body = [
        f"<h1>Evaluation of {escape(result.checkpoint)}</h1>",
        _facts(result),
        "<h2>What limits trust</h2>",
        _list(cautions(result)),
        *_tables(result),
        "<h2>Distributions over chips</h2>",
        *(distributions(TITLES[column], _values(result, column)) for column in DRAWN),
        *_groups(result),
        *_curves(result),
        *_pictures(result, picture),
    ]
    return _page(f"Evaluation of {result.checkpoint}", body)


def comparison_page(found: Comparison) -> bytes:
    """Return the report of a comparison of two runs."""
    sides = {"first": found.first, "second": found.second}
    rows: list[Line] = []
    for column in COLUMNS:
        means = (f"{result.means(FUSED)[column]:.4g}" for result in sides.values())
        rows.append([_title(column), *means, _cell(found.difference(column)), found.verdict(column)])
    titles = ["", *sides, "second - first", "better"]
    values = {name: _values(result, "psnr")[FUSED] for name, result in sides.items()}
    body = [
        "<h1>Comparison of two runs</h1>",
        _list(f"{name}: {run}, {of.checkpoint}" for (name, of), run in zip(sides.items(), found.names, strict=True)),
        _facts(found.first),
        "<h2>Differences on the same chips</h2>",
        f"<p>Means of the fused images, and paired differences with 95 % intervals ({METHOD}). A difference whose"
        " interval holds zero is undecided. One interval in twenty misses the truth: of many columns one may.</p>",
        _table(titles, rows),
        "<h2>Distributions over chips</h2>",
        distributions(TITLES["psnr"], values),
        "<h2>What limits trust</h2>",
        *(f"<h3>{name}</h3>{_list(cautions(result))}" for name, result in sides.items()),
    ]
    return _page("Comparison of two runs", body)


def cautions(result: Evaluation) -> list[str]:
    """Return what a reader must know before trusting the numbers, in sentences."""
    aois = {place_of(row): row["agreement"] for row in result.chips}
    found = [
        f"{len(aois)} AOIs were scored. Chips of one AOI resemble each other, so intervals are over AOIs."
        + (f" Below {LEAST} there are none." if len(aois) < LEAST else "")
        + (f" Below {FEW} they are wide, and may be too narrow still." if LEAST <= len(aois) < FEW else "")
    ]
    if not result.trained:
        found.append("The weights are not known to be trained on this dataset: its AOIs may be among the trained ones.")
    if result.split != "test":
        found.append(f"Split {result.split} is not held out: training or the choice of the checkpoint has used it.")
    if result.skipped:
        found.append(f"{result.skipped} chips are quarantined and were not scored.")
    if result.simulation != "off":
        found.append(f"Revisits are simulated from the target ({result.simulation}): real ones are harder.")
    low = sum(1 for value in aois.values() if isinstance(value, float) and value < LOW_AGREEMENT)
    if low:
        found.append(
            f"AOIs whose revisits agree with the target by less than {LOW_AGREEMENT:g}, as on other days: {low}."
        )
    if any(value is None for value in aois.values()):
        found.append("The agreement of revisits and target is unknown for some AOIs.")
    means = {method: result.means(method) for method in result.methods}
    for column in ("pan_offset", "lr_offset"):
        value = means[FUSED][column]
        if value > FAR:
            found.append(f"The fused images lie {value:.2f} px off ({TITLES[column]}), the mean over chips.")
    worse = [
        _title(column)
        for column in COLUMNS[: 2 * len(METRICS)]
        if any(better(column, means[method][column] - means[FUSED][column]) for method in BASELINES)
    ]
    if worse:
        found.append(f"A bicubic baseline is better than the fused images in: {'; '.join(worse)}.")
    for kind, methods in result.curves().items():
        psnr = [estimate_rows(rows, "psnr").mean for rows in methods[FUSED].values()]
        if len(psnr) > 1 and max(psnr) - min(psnr) < UNMOVED:
            found.append(f"Perturbed revisits ({kind}) hardly change the fused images: they are made of PAN alone.")
    found.append("Adjusted columns use the truth's band means, which no user has.")
    found.append("Columns without target compare with the inputs alone: a method that copies them scores well.")
    return found


def _facts(result: Evaluation) -> str:
    chips = len(result.chips) // len(result.methods)
    simulated = "" if result.simulation == "off" else f", revisits simulated ({result.simulation})"
    return (
        f"<p>Split {escape(result.split)} of {escape(result.dataset)} <small>(index {escape(result.digest)})</small>, "
        f"{chips} chips, {escape(result.registration)} registration{escape(simulated)}. Means over chips; in brackets "
        f"95 % intervals, {METHOD}.</p>"
    )


def _tables(result: Evaluation) -> Iterable[str]:
    for heading, columns in (
        ("Against the target", METRICS),
        ("Against the target, after adjusting each band's mean to it", tuple(name + ADJUSTED for name in METRICS)),
        ("As opensr-test: consistency with the revisits' median, and correctness", opensr.MEASURES),
        ("Without the target: distortions against the revisits' median and PAN, offsets", MEASURES),
    ):
        yield f"<h2>{heading}</h2>"
        best = {column: _best(result, column) for column in columns}
        rows: list[Line] = [
            [method, *(_cell(result.estimate(method, column), method == best[column]) for column in columns)]
            for method in result.methods
        ]
        yield _table(["", *(_title(column.removesuffix(ADJUSTED)) for column in columns)], rows)
    yield "<h2>Fused minus baseline, on the same chips</h2>"
    others = [method for method in result.methods if method != FUSED]
    shown = ("psnr", "ssim", "sam", "ergas", "hqnr")
    rows = [[other, *(_cell(result.difference(name, FUSED, other)) for name in shown)] for other in others]
    yield _table(["", *(TITLES[name] for name in shown)], rows)


def _best(result: Evaluation, column: str) -> str:
    means = {method: result.means(method)[column] for method in result.methods}
    known = {method: value for method, value in means.items() if not math.isnan(value)}
    choose = max if column in HIGHER_IS_BETTER else min
    return choose(known, key=known.__getitem__) if known else ""


def _groups(result: Evaluation) -> Iterable[str]:
    for kind, groups in result.groups().items():
        yield f"<h2>By {'land-cover class' if kind == 'class' else 'agreement of the revisits with the target'}</h2>"
        rows: list[Line] = []
        for name, members in groups.items():
            aois = len({place_of(row) for row in members})
            cells = (
                _cell(estimate_rows([row for row in members if row["method"] == method], column))
                for column in ("psnr", "sam")
                for method in (FUSED, BASELINES[1])
            )
            rows.append([f"{name} ({aois} AOIs)", *cells])
        heads = (f"{TITLES[column]}, {method}" for column in ("psnr", "sam") for method in (FUSED, BASELINES[1]))
        yield _table(["", *heads], rows)


def _curves(result: Evaluation) -> Iterable[str]:
    for kind, methods in result.curves().items():
        yield f"<h2>Perturbed revisits: {kind}</h2>"
        for column in ("psnr", "sam"):
            points = {
                method: {level: estimate_rows(rows, column) for level, rows in levels.items()}
                for method, levels in methods.items()
            }
            yield curves(TITLES[column], UNITS[kind], points)


def _pictures(result: Evaluation, picture: Picture) -> Iterable[str]:
    yield "<h2>Best, median and worst chip by PSNR</h2>"
    rows = sorted((row for row in result.chips if row["method"] == FUSED), key=_psnr)
    for title, row in (("Best", rows[-1]), ("Median", rows[len(rows) // 2]), ("Worst", rows[0])):
        data = base64.b64encode(picture(row)).decode()
        caption = f"{title}: {row['aoi']}, chip {row['chip']}, PSNR {_psnr(row):.2f} dB, SAM {row['sam']:.2f} degrees"
        yield (
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
            f"<figcaption>{escape(caption)}. From the left: the clearest revisit, PAN, fused, target, absolute error."
            "</figcaption></figure>"
        )


def _psnr(row: Row) -> float:
    value = row["psnr"]
    assert isinstance(value, float)
    return value


def _values(result: Evaluation, column: str) -> dict[str, list[float]]:
    return {
        method: [value for row in result.chips if row["method"] == method and isinstance(value := row[column], float)]
        for method in result.methods
    }


def _title(column: str) -> str:
    name = column.removesuffix(ADJUSTED)
    return TITLES.get(name, name) + (", adjusted" if name != column else "")


def _cell(estimate: Estimate, best: bool = False) -> Cell:
    """Return the cell of a mean, whose interval stands below it."""
    mean, _, interval = str(estimate).partition(" ")
    return Cell(mean, interval, best)


def _table(titles: Iterable[str], rows: Iterable[Line]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    lines = ("".join(_html(Cell(cell) if isinstance(cell, str) else cell) for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _html(cell: Cell) -> str:
    small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
    return f"<td{' class=best' if cell.best else ''}>{escape(cell.text)}{small}</td>"


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _page(title: str, body: Iterable[str]) -> bytes:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
    )
    return (PAGE_START + head + "\n".join(body) + "\n</body>\n</html>\n").encode()
