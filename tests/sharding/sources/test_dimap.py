"""Products in DIMAP: tiles, bands by name, gains and special values arrive at their pixels; and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from rasterio.transform import Affine

from sharding.errors import UnusableError
from sharding.sources.scenes.description import Images
from sharding.sources.scenes.grid import Grid
from sharding.sources.scenes.header import Header, Radiometry
from sharding.sources.scenes.layout import File
from sharding.sources.scenes.opened import layer_of
from sharding.sources.scenes.products.dimap import sun_distance
from sharding.sources.scenes.products.read import read_header
from sharding.sources.scenes.raster import Image, read_on_grid
from tests.sharding.sources.satellites import write_dimap

PLACE = Affine(2, 0, 500_000, 0, -2, 5_400_000)
GRID = Grid("EPSG:32631", 500_000.0, 5_400_000.0, 2.0, 2.0, 50, 36)
IDS = "B2", "B1", "B0", "B3"
IMAGE = (100 + np.arange(4 * 36 * 50).reshape(4, 36, 50) % 3900).astype(np.uint16)


def header_of(path: Path) -> Header:
    return read_header(File(path, path.name, path.stat().st_size))


def reflectance(path: Path, order: tuple[str, ...] | None = None) -> Image:
    layer = layer_of(header_of(path), Images(order=order), None)
    return read_on_grid(layer.header, layer.bands, layer.radiometry, GRID)[0]


@pytest.mark.parametrize("jp2", [False, True])
@pytest.mark.parametrize("tiles", [(1, 1), (2, 3), (4, 1)])
def test_tiles_are_one_image(tmp_path: Path, tiles: tuple[int, int], jp2: bool) -> None:
    path = write_dimap(tmp_path, IMAGE, PLACE, ids=IDS, tiles=tiles, jp2=jp2)
    header = header_of(path)
    assert (header.width, header.height, header.date) == (50, 36, "2022-05-12")
    assert header.names == ("red", "green", "blue", "nir")
    assert len(header.pieces) == tiles[0] * tiles[1]
    np.testing.assert_allclose(reflectance(path), IMAGE / 10_000, atol=1e-7)


def test_bands_may_lie_in_groups_of_files(tmp_path: Path) -> None:
    """Pleiades Neo has red, green and blue in one file, and near infrared, red edge and deep blue in another."""
    first = write_dimap(tmp_path, IMAGE[:3], PLACE, ids=("R", "G", "B"), tiles=(2, 1))
    second = write_dimap(tmp_path, IMAGE[1:], PLACE, ids=("NIR", "RE", "DB"), tiles=(2, 1), day="2022-05-13")
    texts = [path.read_text("latin-1") for path in (first, second)]
    groups = []
    for text in texts:
        files, display = (
            text[text.index(f"<{tag}>") : text.index(f"</{tag}>") + len(f"</{tag}>")]
            for tag in ("Data_Files", "Raster_Display")
        )
        groups.append(files.replace("</Data_Files>", f"{display}</Data_Files>"))
        assert text.count(display) == 1
    own = groups[0][groups[0].index("<Raster_Display>") : -len("</Data_Files>")]
    text = texts[0].replace(own, "").replace(groups[0].replace(own, ""), "".join(groups))
    first.write_text(text.replace("<NBANDS>3", "<NBANDS>6"), "latin-1")
    header = header_of(first)
    assert header.names == ("red", "green", "blue", "nir", "rededge", "coastal")
    image, _ = read_on_grid(header, (4, 1, 6), Radiometry(1e-4, 0.0), GRID)
    np.testing.assert_allclose(image, IMAGE[[1, 0, 3]] / 10_000, atol=1e-7)


def test_pixels_of_several_tiles_are_interpolated_across_their_edges(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(50) * 10 + 100, (1, 36, 50)).astype(np.uint16)
    header = header_of(write_dimap(tmp_path, ramp, PLACE, ids=("P",), tiles=(2, 2)))
    assert header.names == ("pan",)
    half = Grid("EPSG:32631", 500_001.0, 5_399_999.0, 2.0, 2.0, 48, 34)
    image, _ = read_on_grid(header, (1,), Radiometry(1.0, 0.0), half)
    np.testing.assert_allclose(image[0], np.broadcast_to(np.arange(48) * 10 + 105, (34, 48)), atol=0.05)


def test_a_radiance_becomes_reflectance_by_gain_sun_and_distance(tmp_path: Path) -> None:
    gains = {"B0": (9.0, 0.5), "B1": (9.5, 0.0), "B2": (10.0, 0.0), "B3": (16.0, 0.0)}
    suns = {"B0": 1915.0, "B1": 1830.0, "B2": 1594.0, "B3": 1060.0}
    path = write_dimap(tmp_path, IMAGE, PLACE, ids=IDS, processing="BASIC", gains=gains, suns=suns, elevation=50.0)
    found = reflectance(path)
    distance = 1.0103  # of the sun on May 12, astronomical units, by almanacs
    for place, band in enumerate(IDS):
        radiance = IMAGE[place] / gains[band][0] + gains[band][1]
        wanted = math.pi * radiance * distance**2 / (suns[band] * math.sin(math.radians(50)))
        np.testing.assert_allclose(found[place], wanted, rtol=1e-3)


@pytest.mark.parametrize(
    ("day", "distance"), [("2022-01-04", 0.98334), ("2022-04-04", 1.0000), ("2022-07-04", 1.01671), ("2022-10-05", 1.0)]
)
def test_the_distance_of_the_sun(day: str, distance: float) -> None:
    assert sun_distance(day) == pytest.approx(distance, abs=4e-4)


def test_bands_without_a_list_get_names_and_gains_by_the_order_that_is_told(tmp_path: Path) -> None:
    gains = {"B0": (20_000.0, 0.0), "B1": (10_000.0, 0.0), "B2": (5_000.0, 0.01), "B3": (2_500.0, 0.0)}
    path = write_dimap(tmp_path, IMAGE, PLACE, ids=IDS, listed=False, gains=gains)
    assert header_of(path).names == (None,) * 4
    with pytest.raises(UnusableError, match="does not say which of its bands is which"):
        reflectance(path)
    found = reflectance(path, ("red", "green", "blue", "nir"))
    wanted = IMAGE / np.array([5_000, 10_000, 20_000, 2_500])[:, None, None] + np.array([0.01, 0, 0, 0])[:, None, None]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_special_values_are_no_data_and_saturation(tmp_path: Path) -> None:
    image = IMAGE.copy()
    image[:, 5:9, 20:30] = 0
    image[1, 0, :3] = 4095
    path = write_dimap(tmp_path, image, PLACE, ids=IDS, tiles=(2, 2))
    layer = layer_of(header_of(path), Images(), None)
    found, saturated = read_on_grid(layer.header, layer.bands, layer.radiometry, GRID)
    assert saturated == 3
    missing = np.zeros((36, 50), np.bool_)
    missing[5:9, 20:30] = True
    np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(missing, found.shape))


def test_a_display_product_needs_a_scale(tmp_path: Path) -> None:
    path = write_dimap(tmp_path, IMAGE, PLACE, ids=IDS, processing="DISPLAY")
    with pytest.raises(UnusableError, match=r"implausible: .* radiometric processing DISPLAY, which is no measure"):
        reflectance(path)
    told = layer_of(header_of(path), Images(scale=0.001, offset=0.0), None)
    image, _ = read_on_grid(told.header, told.bands, told.radiometry, GRID)
    np.testing.assert_allclose(image, IMAGE / 1000, rtol=1e-6)


def test_a_sensor_product_is_refused(tmp_path: Path) -> None:
    path = write_dimap(tmp_path, IMAGE, PLACE, ids=IDS, place=False)
    with pytest.raises(UnusableError, match=r"no-georeference: .* product of level SENSOR .*orthorectify it"):
        header_of(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<Dimap_Document>", "<!DOCTYPE a><Dimap_Document>", "unreadable: .*declares a document type"),
        ('href="IMG_', 'href="../IMG_', "unsafe-path: .*names the tile '../IMG_.*', which is no file beside it"),
        ('href="IMG_', 'href="/vsicurl/http://x/IMG_', "unsafe-path"),
        ('href="IMG_', 'href="no/IMG_', r"missing-file: no/IMG_.* is missing, which DIM_"),
        ("<NBANDS>4", "<NBANDS>3", "wrong-bands: .* tells 3 bands, and its tiles hold 4"),
        ("<NCOLS>50", "<NCOLS>51", "size-mismatch: .* tells 51 x 36 px, and its tiles have 50 x 36"),
        ("<NCOLS>50", "<NCOLS>1e999", "unreadable: .*NCOLS is '1e999', and a number is needed"),
        ('tile_C="2"', 'tile_C="3"', "size-mismatch: .* does not lie where"),
        ("<BAND_INDEX>4", "<BAND_INDEX>5", "wrong-bands: .*BAND_INDEX 5, and files of 4 bands"),
        ("<GAIN>10000.0", "<GAIN>0", "unreadable: .*GAIN 0.0, which must be above 0"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write_dimap(tmp_path, IMAGE, PLACE, ids=IDS, tiles=(1, 2))
    text = path.read_text("latin-1")
    assert old in text
    path.write_text(text.replace(old, new), "latin-1")
    with pytest.raises(UnusableError, match=message):
        header_of(path)
