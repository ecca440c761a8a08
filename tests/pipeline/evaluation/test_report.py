"""The report: one file that needs nothing else, with right numbers, and nothing from outside unescaped."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree  # our own SVG, not from outside

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation.baselines import BASELINES
from pipeline.evaluation.charts import curves, distributions
from pipeline.evaluation.compare import Comparison
from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.report import cautions, comparison_page, evaluation_page
from pipeline.evaluation.result import COLUMNS, COMPARED, FUSED, Evaluation, Row
from sharding.errors import UserError
from sharding.run.named_file import check_page

METHODS = (FUSED, *BASELINES)


def evaluation(aois: int = 8, gain: float = 0.0, hostile: str = "", agreement: float | None = 0.8) -> Evaluation:
    """Return an evaluation of two chips an AOI, whose fused PSNR is 30 + gain plus an AOI's own number."""
    random = np.random.default_rng(0)
    own = random.normal(0, 1, aois)
    rows: list[Row] = [
        {"aoi": f"{hostile}aoi-{aoi}", "chip": chip, "agreement": agreement, "class": f"{hostile}class-{aoi % 2}"}
        | {"method": method, **dict.fromkeys(COLUMNS, 0.5)}
        | {"psnr": 30.0 + own[aoi] + chip + (gain if method == FUSED else -2.0)}
        for aoi in range(aois)
        for chip in range(2)
        for method in METHODS
    ]
    perturbed: list[Row] = [
        {"aoi": "a", "chip": 0, "perturbation": "noise", "level": level, "method": FUSED}
        | dict.fromkeys(COMPARED, 0.5)
        | {"psnr": 30 - 100 * level}
        for level in (0.0, 0.01)
    ]
    return Evaluation(
        f"{hostile}best-2", "test", "off", "centred", rows, METHODS, "runs/a", dataset="d", digest="0" * 64,
        perturbed=perturbed,
    )  # fmt: skip


def test_an_aoi_of_two_datasets_is_one_in_intervals() -> None:
    """A mix numbers its AOIs; those of one name show one place, whatever slashes the name has."""
    once = evaluation(5)
    mixed = evaluation(5)
    mixed.chips[:] = [
        {**row, "aoi": f"{part}/{row['aoi']}", "place": row["aoi"]} for part in (0, 1) for row in once.chips
    ]
    assert str(mixed.estimate(FUSED, "psnr")) == str(once.estimate(FUSED, "psnr"))
    assert str(mixed.difference("psnr", FUSED, BASELINES[0])) == str(once.difference("psnr", FUSED, BASELINES[0]))
    assert mixed.estimate(FUSED, "psnr").aois == 5
    assert ", 5 AOIs: psnr" in mixed.table()
    assert cautions(mixed)[0] == cautions(once)[0]


def picture(row: Row) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3)).save(buffer, format="PNG")
    return buffer.getvalue()


class Reader(HTMLParser):
    """All tags, and what they refer to."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        assert not any(name.startswith("on") for name, _ in attrs)


def test_the_page_needs_no_other_file_and_runs_no_script() -> None:
    page = evaluation_page(evaluation(), picture)
    reader = Reader(page)
    assert not {"script", "link", "iframe", "object", "embed"} & set(reader.tags)
    assert len(reader.links) == 3
    for link in reader.links:
        assert Image.open(io.BytesIO(base64.b64decode(link.removeprefix("data:image/png;base64,")))).size == (4, 3)
    for svg in re.findall(r"<svg.*?</svg>", page.decode(), re.S):
        ElementTree.fromstring(svg)  # noqa: S314


def test_names_from_outside_are_text() -> None:
    hostile = "<td onclick=alert(1)><script>"
    for page in (
        evaluation_page(evaluation(hostile=hostile), picture),
        comparison_page(Comparison(evaluation(hostile=hostile), evaluation(hostile=hostile), (hostile, hostile))),
    ):
        assert "script" not in Reader(page).tags
        assert b"&lt;script&gt;" in page


def test_means_intervals_and_pictures_are_those_of_the_rows() -> None:
    result = evaluation(gain=5.0)
    drawn: list[Row] = []

    def draw(row: Row) -> bytes:
        drawn.append(row)
        return picture(row)

    page = evaluation_page(result, draw).decode()
    found = result.estimate(FUSED, "psnr")
    assert f"<td class=best>{found.mean:.4g}<small>[{found.low:.4g}, {found.high:.4g}]</small></td>" in page
    difference = result.difference("psnr", FUSED, BASELINES[0])
    assert (difference.mean, difference.low, difference.high) == pytest.approx((7, 7, 7))
    psnr = sorted(row["psnr"] for row in result.chips if row["method"] == FUSED)  # type: ignore[type-var]
    assert [row["psnr"] for row in drawn] == [psnr[-1], psnr[8], psnr[0]]
    assert f"Best: {drawn[0]['aoi']}, chip {drawn[0]['chip']}, PSNR {psnr[-1]:.2f} dB" in page
    assert "class-0 (4 AOIs)" in page
    assert "0.7 to 0.9 (8 AOIs)" in page


def test_a_comparison_pairs_chips_and_decides_by_the_interval() -> None:
    found = Comparison(evaluation(gain=0.0), evaluation(gain=0.5), ("runs/a", "runs/b"))
    assert found.difference("psnr").mean == pytest.approx(0.5)
    assert found.verdict("psnr") == "second"
    assert found.verdict("sam") == "undecided"
    assert Comparison(found.second, found.first, found.names).verdict("psnr") == "first"
    assert re.search(r"^psnr +\d\d\.\d+ +\d\d\.\d+  0\.5 \[0\.5, 0\.5\] second$", found.table(), re.M)
    with pytest.raises(ValueError, match="chips differ"):
        Comparison(evaluation(8), evaluation(7), ("a", "b")).difference("psnr")


def test_what_limits_trust_is_said() -> None:
    assert any(line.startswith("8 AOIs were scored") and "Below 30" in line for line in cautions(evaluation()))
    assert any("Below 5 there are none" in line for line in cautions(evaluation(aois=3)))
    assert any("less than 0.5" in line and line.endswith(": 8.") for line in cautions(evaluation(agreement=0.2)))
    assert any("is unknown" in line for line in cautions(evaluation(agreement=None)))
    assert any("bicubic baseline is better" in line and "PSNR" in line for line in cautions(evaluation(gain=-5)))
    assert not any("bicubic baseline is better" in line for line in cautions(evaluation(gain=5)))
    assert not any("made of PAN alone" in line for line in cautions(evaluation()))


def test_charts_leave_out_what_is_no_number() -> None:
    drawn = distributions("PSNR", {"a": [1.0, 2.0, math.nan], "b": [math.inf]})
    assert drawn.count("<rect") == 2
    assert distributions("PSNR", {"a": [math.nan]}) == ""
    line = curves("PSNR", "level", {"a": {0.0: Estimate(1, 0.5, 1.5, 9), 1.0: Estimate(2, math.nan, math.nan, 3)}})
    assert line.count("<circle") == 2
    assert curves("PSNR", "level", {"a": {0.0: Estimate(math.nan, math.nan, math.nan, 0)}}) == ""


def test_only_a_page_of_ours_is_replaced(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours.html", tmp_path / "other.html"
    ours.write_bytes(evaluation_page(evaluation(), picture))
    other.write_text("<!DOCTYPE html><p>mine")
    check_page("--report", ours)
    check_page("--report", tmp_path / "new.html")
    with pytest.raises(UserError, match=r"this program did not write it"):
        check_page("--report", other)
    with pytest.raises(UserError, match=r"does not end in \.html"):
        check_page("--report", tmp_path / "page.pdf")
    with pytest.raises(UserError, match="no existing folder"):
        check_page("--report", tmp_path / "none" / "page.html")
