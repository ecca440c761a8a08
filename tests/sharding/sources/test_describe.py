"""`describe` drafts a scenes.toml with which `shard` makes the dataset that a careful one makes."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
from rasterio.crs import CRS
from rasterio.transform import Affine

from cluster.cli import main
from sharding.errors import UserError
from sharding.sources.scenes.describe import describe_folder
from tests.sharding.sources.sensors import NORTH, write_rgbn, write_tiff


def test_a_draft_is_enough_to_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    write_rgbn(folder, 3, side=120)
    (folder / "scenes.toml").unlink()
    assert main(["describe", str(folder), "--write"]) == 0
    assert "check the lines with a question mark" in capsys.readouterr().out
    draft = tomllib.loads((folder / "scenes.toml").read_text())
    assert draft["revisits"]["files"] == "{scene}/lr_{date}.tif"
    assert draft["pan"]["files"] == "{scene}/pan.tif"
    assert draft["target"]["files"] == "{scene}/ms.tif"
    assert {kind: draft[kind]["scale"] for kind in draft} == dict.fromkeys(("revisits", "pan", "target"), 1e-4)
    arguments = ["--source", "scenes", "--input", str(folder), "--output", str(tmp_path / "out"), "--revisits", "3"]
    assert main(["shard", *arguments, "--workers", "1"]) == 0
    assert "bands blue, green, red, nir, of targets blue, green, red, nir" in capsys.readouterr().out
    before = (folder / "scenes.toml").read_text()
    assert main(["describe", str(folder), "--write"]) == 2
    assert (folder / "scenes.toml").read_text() == before


def test_a_flat_folder_and_its_open_questions(tmp_path: Path) -> None:
    fine, coarse = Affine(2, 0, 5e5, 0, -2, NORTH), Affine(8, 0, 5e5, 0, -8, NORTH)
    utm = CRS.from_epsg(32631)
    rng = np.random.default_rng(0)
    for site in ("north", "south"):
        counts = rng.integers(200, 2048, (4, 80, 80)).astype(np.uint16)
        write_tiff(tmp_path / f"{site}_pan.tif", counts[:1], fine, utm)
        write_tiff(tmp_path / f"{site}_sharp.tif", counts, fine, utm)
        for visit in (1, 2):
            write_tiff(tmp_path / f"{site}_visit{visit}.tif", counts[:, ::4, ::4], coarse, None)
    text = describe_folder(tmp_path)
    draft = tomllib.loads(text)
    assert draft["pan"]["files"] == "{scene}_pan.tif"
    assert draft["target"]["files"] == "{scene}_sharp.tif"
    assert draft["revisits"]["files"] == "{scene}_visit{revisit}.tif"
    assert text.count("# ? the files do not name their 4 bands") == 2
    assert "# ? no coordinate system" in text
    assert draft["pan"]["scale"] == pytest.approx(1 / 2047, rel=1e-4)


def test_a_folder_without_the_three_kinds_is_refused(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", np.ones((1, 9, 9), np.uint16), Affine(2, 0, 0, 0, -2, 0), CRS.from_epsg(32631))
    with pytest.raises(UserError, match=r"needs rasters of three kinds.*it holds 1 of 1 bands with pixels of 2 m"):
        describe_folder(tmp_path)
