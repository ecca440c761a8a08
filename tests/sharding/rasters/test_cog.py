"""Cloud-optimised GeoTIFFs: whole or absent, the same bytes for the same rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rio_cogeo.cogeo import cog_validate

from sharding.errors import UserError
from sharding.rasters.cog import RasterFacts, preview_png, write_cog

FACTS = RasterFacts(
    height=1100,
    width=1300,
    bands=("red", "green", "blue", "B08"),
    crs="EPSG:32632",
    transform=(1.5, 0.0, 400_000.0, 0.0, -1.5, 5_000_000.0),
    tags={"SATFUSION_MODEL": "srcnn+pnn"},
)


def image() -> NDArray[np.float32]:
    return 0.1 + np.random.default_rng(1).random((4, 1100, 1300), np.float32)


def bands() -> Iterator[NDArray[np.float32]]:
    whole = image()
    for first in range(0, 1100, 78):
        yield whole[:, first : first + 78]


def write(path: Path, facts: RasterFacts = FACTS) -> None:
    with write_cog(path, facts) as raster:
        for rows in bands():
            raster.write(rows, np.ones(rows.shape[-2:], bool))


def test_rows_become_a_valid_geotiff(tmp_path: Path) -> None:
    write(tmp_path / "one.tif")
    assert cog_validate(tmp_path / "one.tif", strict=True, quiet=True) == (True, [], [])
    with rasterio.open(tmp_path / "one.tif") as raster:
        assert (raster.crs.to_epsg(), tuple(raster.transform)[:6]) == (32632, FACTS.transform)
        assert raster.descriptions == tuple(FACTS.bands)
        assert raster.overviews(1) == [2, 4]
        assert raster.tags()["SATFUSION_MODEL"] == "srcnn+pnn"
        assert np.abs(raster.read() * 1e-4 - image()).max() <= 0.51e-4
    write(tmp_path / "two.tif")
    assert (tmp_path / "one.tif").read_bytes() == (tmp_path / "two.tif").read_bytes()
    assert len(preview_png(tmp_path / "one.tif", [0, 1, 2])) > 1000
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("bands", "red"), [(("red", "green", "blue"), True), (("nir", "red", "green"), False)])
def test_only_true_colours_are_marked_as_such(bands: tuple[str, ...], red: bool, tmp_path: Path) -> None:
    with write_cog(tmp_path / "one.tif", replace(FACTS, bands=bands, height=16, width=16)) as raster:
        raster.write(np.ones((3, 16, 16), np.float32), np.ones((16, 16), bool))
    with rasterio.open(tmp_path / "one.tif") as raster:
        assert raster.descriptions == bands
        assert (raster.colorinterp[0] == ColorInterp.red) == red


def test_a_valid_pixel_is_never_stored_as_no_data(tmp_path: Path) -> None:
    facts = replace(FACTS, height=1, width=4, bands=("red",))
    values = np.array([[[-0.5, 0.0, 0.1, 9.0]]], np.float32)
    with write_cog(tmp_path / "one.tif", facts) as raster:
        raster.write(values, np.array([[True, True, False, True]]))
    with rasterio.open(tmp_path / "one.tif") as file:
        assert file.read().tolist() == [[[1, 1, 0, 65535]]]


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with write_cog(tmp_path / "one.tif", FACTS) as raster:
            raster.write(next(bands()), np.ones((78, 1300), bool))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with pytest.raises(UserError, match=r"cannot write one\.tif"):
        write(tmp_path / "one.tif", replace(FACTS, crs="EPSG:99999999"))
    with pytest.raises(UserError, match=r"cannot write one\.tif"):
        write(tmp_path / "none" / "one.tif")
    assert list(tmp_path.iterdir()) == []
