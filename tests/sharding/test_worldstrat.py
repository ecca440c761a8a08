from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.errors import NotGeoreferencedWarning

from sharding.errors import UserError
from sharding.worldstrat import (
    SPLIT_FILE,
    AoiFiles,
    UnusableError,
    check_files,
    find_aois,
    read_scene,
    read_split_file,
)
from tests.sharding.conftest import World


def rewrite(path: Path, image: np.ndarray) -> None:
    """Replace a raster's pixels, with whatever shape and dtype the new ones have."""
    with rasterio.open(path) as file:
        profile = file.profile
    count, height, width = image.shape
    profile.update(count=count, height=height, width=width, dtype=image.dtype.name, compress=None, predictor=None)
    profile = {key: value for key, value in profile.items() if value is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", **profile) as file:
            file.write(image)


def first(world: World) -> AoiFiles:
    return next(aoi for aoi in find_aois(world.folder) if aoi.name == world.names[0])


def refusal(world: World) -> UnusableError:
    """Return why the world's first AOI is refused."""
    aoi = first(world)
    try:
        check_files(aoi, "ps", 3)
        read_scene(aoi, "ps", 3)
    except UnusableError as error:
        return error
    pytest.fail(f"AOI {aoi.name} was taken")


def test_names_with_spaces_and_hyphens_are_found(world: World) -> None:
    found = find_aois(world.folder)
    assert {aoi.name for aoi in found} == set(world.names)
    assert any(" " in aoi.name and "-" in aoi.name for aoi in found)
    assert all(list(aoi.revisits) == list(range(1, 9)) for aoi in found)


def test_revisits_are_numbered_by_the_last_number_in_numeric_order(shared: Path) -> None:
    found = {aoi.name: aoi for aoi in find_aois(shared / "worldstrat-sample")}
    amnesty = found["Amnesty POI-20-2-2"]
    assert list(amnesty.revisits) == list(range(1, 17))
    assert amnesty.revisits[10]["L2A_data"].name == "Amnesty POI-20-2-2-10-L2A_data.tiff"


def test_both_metadata_key_sets_are_read(world: World) -> None:
    scenes = [read_scene(aoi, "ps", 8) for aoi in find_aois(world.folder)[:4]]
    assert {scene.scl[0] is None for scene in scenes} == {True, False}  # SCL goes with the longer key set
    for scene in scenes:
        assert scene.hr_date is not None
        assert all(revisit.date is not None for revisit in scene.revisits)
        assert all(revisit.cloud_cover is not None for revisit in scene.revisits)
        assert scene.crs == "EPSG:4326"


def test_a_scene_holds_the_first_revisits_and_their_digests(shared: Path) -> None:
    aoi = next(a for a in find_aois(shared / "worldstrat-sample") if a.name.startswith("Amnesty"))
    scene = read_scene(aoi, "ps", 8)
    assert [revisit.number for revisit in scene.revisits] == list(range(1, 9))
    assert scene.revisits[0].date == "2017-01-09"
    assert scene.hr_date == "2013-02-07"
    assert scene.lr.shape == (8, 3, 157, 159)
    assert scene.hr.shape == (3, 1054, 1054)
    assert scene.scl == (None,) * 8
    assert len(scene.sources) == 2 + 8 * 4
    assert scene.bounds[0] == pytest.approx(92.38122, abs=1e-5)


def test_the_missing_or_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        find_aois(tmp_path / "none")
    with pytest.raises(UserError, match="holds no AOI"):
        find_aois(tmp_path)


def test_a_split_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    assert read_split_file(tmp_path) is None
    (tmp_path / SPLIT_FILE).write_text("aoi,part\na,train\n")
    with pytest.raises(UserError, match="lacks the column"):
        read_split_file(tmp_path)


def test_a_split_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / SPLIT_FILE).write_text("tile,split\nLandcover-1,train\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"cannot be read as CSV in UTF-8 .*--split seeded"):
        read_split_file(tmp_path)


def test_missing_rasters_are_told(spoilt: World) -> None:
    aoi = first(spoilt)
    aoi.revisits[3]["CLM"].unlink()
    assert refusal(spoilt).reason == "missing-raster"
    assert f"{aoi.name}-3-CLM.tiff" in refusal(spoilt).detail
    aoi.hr["pan"].unlink()
    assert f"{aoi.name}_pan.tiff" in refusal(spoilt).detail


def test_a_missing_lr_folder_is_too_few_revisits(spoilt: World) -> None:
    shutil.rmtree(first(spoilt).revisits[1]["CLM"].parent)
    assert refusal(spoilt).reason == "too-few-revisits"
    assert "0 revisits where 3 are needed" in refusal(spoilt).detail


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.98])
@pytest.mark.parametrize("which", ["hr", "lr"])
def test_truncated_rasters_are_told(spoilt: World, which: str, keep: float) -> None:
    aoi = first(spoilt)
    path = aoi.hr["ps"] if which == "hr" else aoi.revisits[2]["L2A_data"]
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    assert refusal(spoilt).reason == "unreadable-raster"
    assert path.name in refusal(spoilt).detail


def test_wrong_sizes_are_told(spoilt: World) -> None:
    aoi = first(spoilt)
    with rasterio.open(aoi.revisits[2]["CLM"]) as file:
        mask = file.read()
    rewrite(aoi.revisits[2]["CLM"], mask[:, :-1])
    assert refusal(spoilt).reason == "wrong-size"
    rewrite(aoi.revisits[2]["CLM"], mask)
    with rasterio.open(aoi.revisits[3]["L2A_data"]) as file:
        image = file.read()
    rewrite(aoi.revisits[3]["L2A_data"], image[:, :, :-2])
    assert refusal(spoilt).reason == "wrong-size"
    assert "-3-L2A_data.tiff" in refusal(spoilt).detail


def test_spot_rasters_of_other_size_bands_type_or_without_data_are_told(spoilt: World) -> None:
    aoi = first(spoilt)
    with rasterio.open(aoi.hr["pan"]) as file:
        pan = file.read()
    rewrite(aoi.hr["pan"], pan[:, ::2, ::2])
    assert refusal(spoilt).reason == "wrong-size"
    rewrite(aoi.hr["pan"], pan.astype(np.float32))
    assert refusal(spoilt).reason == "wrong-type"
    rewrite(aoi.hr["pan"], np.zeros_like(pan))
    assert refusal(spoilt).reason == "no-data"
    rewrite(aoi.hr["pan"], pan)
    rewrite(aoi.hr["ps"], pan)
    assert refusal(spoilt).reason == "wrong-bands"


def test_nan_is_told(spoilt: World) -> None:
    path = first(spoilt).revisits[1]["L2A_data"]
    with rasterio.open(path) as file:
        image = file.read()
    image[3, 5, 5] = np.nan
    rewrite(path, image)
    assert refusal(spoilt).reason == "not-finite"


def test_broken_metadata_is_told_and_missing_is_not(spoilt: World) -> None:
    path = first(spoilt).revisits[1]["metadata"]
    path.write_text("{")
    assert refusal(spoilt).reason == "unreadable-metadata"
    path.unlink()
    assert read_scene(first(spoilt), "ps", 3).revisits[0].date is None
