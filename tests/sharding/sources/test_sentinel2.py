"""Products of Sentinel-2 as delivered: the right band, value, place and cloud at each pixel; and what is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sharding.errors import UnusableError
from sharding.sources.scenes.grid import Grid
from sharding.sources.scenes.header import Radiometry
from sharding.sources.scenes.layout import File, walk
from sharding.sources.scenes.products.metadata import MAX_BYTES
from sharding.sources.scenes.products.read import read_header
from sharding.sources.scenes.raster import read_mask, read_on_grid
from tests.sharding.sources.satellites import write_safe, zip_safe

CORNER = 500_000.0, 5_400_000.0
GRID = Grid("EPSG:32631", *CORNER, 10.0, 10.0, 60, 48)
TOLD = Radiometry()


def values(rows: int, columns: int, least: int) -> NDArray[np.uint16]:
    return (least + np.arange(rows * columns).reshape(rows, columns)).astype(np.uint16)


BANDS = {"B02": values(48, 60, 1200), "B04": values(48, 60, 5000), "B11": values(24, 30, 2000)}


def listed(path: Path) -> File:
    return File(path, path.name, path.stat().st_size)


@pytest.mark.parametrize("packed", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("level", ["1C", "2A"])
def test_bands_have_their_values_at_their_pixels(tmp_path: Path, level: str, packed: int | None) -> None:
    path = write_safe(tmp_path, "2022-05-12", BANDS, CORNER, level=level)
    path = path if packed is None else zip_safe(path, packed)
    header = read_header(listed(path))
    assert header.names == ("B02", "B04", "B11")
    assert (header.width, header.height, header.date) == (60, 48, "2022-05-12")
    assert header.processing == "processing baseline 04.00"
    image, saturated = read_on_grid(header, (2, 1), TOLD, GRID)
    assert saturated == 0
    wanted = np.stack([BANDS["B04"], BANDS["B02"]]) / 10_000 - 0.1
    np.testing.assert_allclose(image, wanted, atol=1e-6)
    assert list(tmp_path.iterdir()) == [path], "nothing is unpacked"


def test_a_band_of_20_m_lies_on_the_land_of_the_10_m_bands(tmp_path: Path) -> None:
    east = np.broadcast_to(CORNER[0] + 20 * (np.arange(30) + 0.5), (24, 30))
    ramp = np.round(2000 + (east - CORNER[0])).astype(np.uint16)  # one count a metre
    header = read_header(listed(write_safe(tmp_path, "2022-05-12", {**BANDS, "B11": ramp}, CORNER, offset=0)))
    image, _ = read_on_grid(header, (3,), TOLD, GRID)
    inner = image[0, 4:-4, 4:-4] * 10_000 - 2000
    np.testing.assert_allclose(inner, np.broadcast_to(10 * (np.arange(60) + 0.5), (48, 60))[4:-4, 4:-4], atol=0.6)


def test_offsets_are_those_of_the_metadata_and_never_of_the_date(tmp_path: Path) -> None:
    old = read_header(listed(write_safe(tmp_path, "2022-05-12", BANDS, CORNER, baseline="03.01", offset=None)))
    assert set(old.offsets) == {0.0}
    assert old.flaw is None
    harmonised = read_header(listed(write_safe(tmp_path, "2023-05-12", BANDS, CORNER, offset=0)))
    assert set(harmonised.offsets) == {0.0}
    silent = read_header(listed(write_safe(tmp_path, "2024-05-12", BANDS, CORNER, offset=None)))
    assert silent.flaw == "has processing baseline 04.00, whose offset its metadata do not tell"


def test_no_data_and_saturation_are_neither_smeared_nor_lost(tmp_path: Path) -> None:
    red = BANDS["B04"].copy()
    red[10:20, 30:40] = 0
    red[0, 0] = 65535
    header = read_header(listed(write_safe(tmp_path, "2022-05-12", {**BANDS, "B04": red}, CORNER)))
    image, saturated = read_on_grid(header, (2,), TOLD, GRID)
    assert saturated == 1
    missing = np.zeros((48, 60), np.bool_)
    missing[10:20, 30:40] = True
    np.testing.assert_array_equal(np.isnan(image[0]), missing)
    moved = Grid("EPSG:32631", CORNER[0] + 3.0, CORNER[1] - 4.0, 10.0, 10.0, 59, 47)
    shifted, _ = read_on_grid(header, (2,), TOLD, moved)
    assert np.nanmin(shifted) >= 0.4 - 1e-6, "0 is no dark pixel"


def test_clouds_are_those_of_the_scene_classes(tmp_path: Path) -> None:
    classes = np.full((24, 30), 5, np.uint8)
    for column, value in enumerate((0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11)):
        classes[:, column] = value
    header = read_header(listed(write_safe(tmp_path, "2022-05-12", BANDS, CORNER, mask=classes)))
    assert header.mask is not None
    found = read_mask(header.mask, GRID, 255)
    wanted = [255, 255, 0, 1, 0, 0, 0, 1, 1, 1, 0]
    np.testing.assert_array_equal(found[0, ::2][:11], wanted)
    np.testing.assert_array_equal(found[0, 1::2][:11], wanted)


def test_clouds_of_l1c_are_opaque_ones_and_cirrus_but_not_snow(tmp_path: Path) -> None:
    classes = np.zeros((8, 10), np.uint8)
    classes[0, :4] = (0, 1, 2, 3)
    header = read_header(listed(write_safe(tmp_path, "2022-05-12", BANDS, CORNER, level="1C", mask=classes)))
    assert header.mask is not None
    np.testing.assert_array_equal(read_mask(header.mask, GRID, 255)[0, ::6][:5], [0, 1, 1, 0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": '<!DOCTYPE a [<!ENTITY b "c">]>'}, "unreadable: .*declares a document type or entities"),
        ({"extra": "<broken>"}, "unreadable: .*is no XML"),
        ({"baseline": "soon"}, "unreadable: .*PROCESSING_BASELINE is 'soon', and a number is needed"),
    ],
)
def test_metadata_that_cannot_be_trusted_are_refused(tmp_path: Path, change: dict[str, str], message: str) -> None:
    offset = None if "baseline" in change else -1000
    path = write_safe(tmp_path, "2022-05-12", BANDS, CORNER, offset=offset, **change)  # type: ignore[arg-type]
    with pytest.raises(UnusableError, match=message):
        read_header(listed(path))


def test_huge_metadata_are_not_read(tmp_path: Path) -> None:
    path = write_safe(tmp_path, "2022-05-12", BANDS, CORNER)
    with (path / "MTD_MSIL2A.xml").open("ab") as file:
        file.truncate(MAX_BYTES + 1)
    packed = zip_safe(path)
    assert packed.stat().st_size < 1 << 20
    with pytest.raises(UnusableError, match=f"absurd-size: .*has more than {MAX_BYTES} bytes"):
        read_header(listed(packed))


def test_bands_that_are_missing_elsewhere_or_damaged(tmp_path: Path) -> None:
    path = write_safe(tmp_path, "2022-05-12", BANDS, CORNER)
    (raster,) = path.rglob("*_B11_20m.jp2")
    kept = raster.read_bytes()
    raster.unlink()
    assert read_header(listed(path)).names == ("B02", "B04"), "bands that were deleted are not there"
    raster.write_bytes(kept[: len(kept) // 3])
    with pytest.raises(UnusableError, match=r"unreadable: .*_B11_20m\.jp2 is damaged"):
        read_on_grid(read_header(listed(path)), (3,), TOLD, GRID)
    other = write_safe(tmp_path, "2022-05-12", {"B11": BANDS["B11"]}, (CORNER[0] + 20, CORNER[1]), satellite="S2B")
    raster.write_bytes(next(other.rglob("*_B11_20m.jp2")).read_bytes())
    with pytest.raises(UnusableError, match=r"size-mismatch: .* does not cover the land of"):
        read_header(listed(path))


def test_zips_that_are_no_product(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(b"PK\3\4 and no more")
    with pytest.raises(UnusableError, match=r"unreadable: a\.zip is no whole zip"):
        read_header(listed(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../x.SAFE/MTD_MSIL2A.xml", "<a/>")
    with pytest.raises(UnusableError, match=r"missing-file: a\.zip is no zip of one product"):
        read_header(listed(path))


def test_a_folder_of_a_product_is_one_file(tmp_path: Path) -> None:
    path = write_safe(tmp_path / "site", "2022-05-12", {"B02": BANDS["B02"]}, CORNER)
    assert [file.name for file in walk(tmp_path)] == [f"site/{path.name}"]
