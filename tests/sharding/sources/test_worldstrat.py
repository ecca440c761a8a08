from __future__ import annotations

import contextlib
import hashlib
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine

from sharding.errors import UnusableError, UserError
from sharding.prepare.options import SampleOptions
from sharding.prepare.sample import make_sample
from sharding.sources.worldstrat.files import open_source
from sharding.sources.worldstrat.layout import SPLIT_FILE, AoiFiles, check_files, read_split_file
from sharding.sources.worldstrat.rasters import read_scene
from tests.sharding.conftest import World, aois_of

THREE = SampleOptions(revisits=3)


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
    return next(aoi for aoi in aois_of(world.folder) if aoi.name == world.names[0])


def path_of(world: World, kind: str) -> Path:
    """Return where the first AOI's ``ps``, ``pan``, or ``2-CLM`` and the like lie."""
    aoi = first(world)
    number, _, layer = kind.partition("-")
    return Path((aoi.revisits[int(number)][layer] if layer else aoi.hr[kind]).path)


def pixels(path: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as file:
            image: np.ndarray = file.read()
    return image


def refusal(world: World, options: SampleOptions = THREE) -> UnusableError:
    """Return why the world's first AOI is refused."""
    aoi = first(world)
    try:
        check_files(aoi, options)
        make_sample(aoi, options)
    except UnusableError as error:
        return error
    pytest.fail(f"AOI {aoi.name} was taken")


def test_names_with_spaces_and_hyphens_are_found(world: World) -> None:
    found = aois_of(world.folder)
    assert {aoi.name for aoi in found} == set(world.names)
    assert any(" " in aoi.name and "-" in aoi.name for aoi in found)
    assert all(list(aoi.revisits) == list(range(1, 9)) for aoi in found)


def test_revisits_are_numbered_by_the_last_number_in_numeric_order(shared: Path) -> None:
    found = {aoi.name: aoi for aoi in aois_of(shared / "worldstrat-sample")}
    amnesty = found["Amnesty POI-20-2-2"]
    assert list(amnesty.revisits) == list(range(1, 17))
    assert amnesty.revisits[10]["L2A_data"].name == "Amnesty POI-20-2-2-10-L2A_data.tiff"


def test_both_metadata_key_sets_are_read(world: World) -> None:
    scenes = [read_scene(aoi, SampleOptions()) for aoi in aois_of(world.folder)[:4]]
    assert {scene.scl[0] is None for scene in scenes} == {True, False}  # SCL goes with the longer key set
    for scene in scenes:
        assert scene.hr_date is not None
        assert all(revisit.date is not None for revisit in scene.revisits)
        assert all(revisit.cloud_cover is not None for revisit in scene.revisits)
        assert scene.crs == "EPSG:4326"


def test_a_scene_holds_the_first_revisits_and_their_digests(shared: Path) -> None:
    aoi = next(a for a in aois_of(shared / "worldstrat-sample") if a.name.startswith("Amnesty"))
    scene = read_scene(aoi, SampleOptions())
    assert [revisit.number for revisit in scene.revisits] == list(range(1, 9))
    assert scene.revisits[0].date == "2017-01-09"
    assert scene.hr_date == "2013-02-07"
    assert scene.lr.shape == (8, 3, 157, 159)
    assert scene.hr.shape == (3, 1054, 1054)
    assert scene.scl == (None,) * 8
    assert scene.bounds[0] == pytest.approx(92.38122, abs=1e-5)
    used = aoi.used(SampleOptions())
    assert list(scene.sources) == [file.name for file in used]
    assert len(used) == 2 + 8 * 4
    assert scene.bytes_in == sum(file.size for file in used)
    assert all(hashlib.sha256(Path(file.path).read_bytes()).hexdigest() == scene.sources[file.name] for file in used)


def test_the_missing_or_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        open_source(tmp_path / "none", "l2a")
    with pytest.raises(UserError, match="holds no AOI"):
        open_source(tmp_path, "l2a")
    (tmp_path / "hr_dataset" / "Landcover-1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"lr_dataset/<AOI>/L1C/ or lr_dataset_l1c\.zip"):
        open_source(tmp_path, "l1c")


def test_a_split_file_of_other_columns_is_refused(tiny: World, spoilt: World) -> None:
    assert read_split_file(open_source(tiny.folder, "l2a")) is None
    (spoilt.folder / SPLIT_FILE).write_text("aoi,part\na,train\n")
    with pytest.raises(UserError, match="lacks the column"):
        read_split_file(open_source(spoilt.folder, "l2a"))


def test_a_split_file_that_is_not_utf8_is_refused(spoilt: World) -> None:
    (spoilt.folder / SPLIT_FILE).write_text("tile,split\nLandcover-1,train\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"--splits seeded does not read.* cannot be read as text in UTF-8"):
        read_split_file(open_source(spoilt.folder, "l2a"))


def test_missing_rasters_are_told(spoilt: World) -> None:
    path_of(spoilt, "3-CLM").unlink()
    assert refusal(spoilt).reason == "missing-file"
    assert f"{first(spoilt).name}-3-CLM.tiff" in refusal(spoilt).detail
    path_of(spoilt, "pan").unlink()
    assert f"{first(spoilt).name}_pan.tiff" in refusal(spoilt).detail


def test_a_raster_that_goes_or_grows_after_the_listing_is_told(spoilt: World) -> None:
    aoi = first(spoilt)
    path = path_of(spoilt, "pan")
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(UnusableError, match=r"unreadable: .*_pan.tiff has changed since it was listed"):
        make_sample(aoi, THREE)
    path.unlink()
    with pytest.raises(UnusableError, match=r"missing-file: .*_pan.tiff is gone"):
        make_sample(aoi, THREE)


def test_a_missing_lr_folder_is_too_few_revisits(spoilt: World) -> None:
    shutil.rmtree(path_of(spoilt, "1-CLM").parent)
    assert refusal(spoilt).reason == "too-few-revisits"
    assert "0 revisits where 3 are needed" in refusal(spoilt).detail


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.9])
@pytest.mark.parametrize("which", ["ps", "pan", "2-L2A_data", "2-CLM"])
def test_truncated_rasters_are_told(spoilt: World, which: str, keep: float) -> None:
    path = path_of(spoilt, which)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    assert refusal(spoilt).reason == "unreadable"
    assert path.name in refusal(spoilt).detail


def test_damage_anywhere_is_told_or_harmless(spoilt: World) -> None:
    """Whatever the bytes are, an AOI ends as a sample or with a reason, never with another error."""
    generator = np.random.default_rng(0)
    for kind in ("ps", "2-L2A_data", "2-CLM", "1-metadata"):
        path = path_of(spoilt, kind)
        whole = path.read_bytes()
        for _ in range(40):
            damaged = np.frombuffer(whole, np.uint8).copy()
            where = generator.integers(min(len(damaged), 600), size=4)
            damaged[where] = generator.integers(256, size=4)
            path.write_bytes(damaged.tobytes())
            with contextlib.suppress(UnusableError):
                assert make_sample(first(spoilt), THREE).images["lr"].shape == (3, 3, 160, 160)
        path.write_bytes(whole)


def test_a_file_that_only_claims_to_be_a_tiff_is_told(spoilt: World, tmp_path: Path) -> None:
    """GDAL reads formats that point at other files; none of them is followed."""
    path = path_of(spoilt, "pan")
    shutil.copy(path, tmp_path / "other.tiff")
    path.write_text(
        f'<VRTDataset rasterXSize="80" rasterYSize="80"><VRTRasterBand dataType="UInt16" band="1"><SimpleSource>'
        f"<SourceFilename>{tmp_path}/other.tiff</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    assert refusal(spoilt).reason == "unreadable"


def test_wrong_sizes_are_told(spoilt: World) -> None:
    path = path_of(spoilt, "2-CLM")
    mask = pixels(path)
    rewrite(path, mask[:, :-1])
    assert refusal(spoilt).reason == "size-mismatch"
    rewrite(path, mask)
    path = path_of(spoilt, "3-L2A_data")
    rewrite(path, pixels(path)[:, :, :-2])
    assert refusal(spoilt).reason == "size-mismatch"
    assert "-3-L2A_data.tiff" in refusal(spoilt).detail


def test_spot_rasters_of_other_size_bands_or_type_are_told(spoilt: World) -> None:
    path = path_of(spoilt, "pan")
    pan = pixels(path)
    rewrite(path, pan[:, ::2, ::2])
    assert refusal(spoilt).reason == "size-mismatch"
    rewrite(path, pan.astype(np.float32))
    assert refusal(spoilt).reason == "wrong-type"
    rewrite(path, pan)
    rewrite(path_of(spoilt, "ps"), pan)
    assert refusal(spoilt).reason == "wrong-bands"


def test_revisits_of_other_bands_or_type_are_told(spoilt: World) -> None:
    path = path_of(spoilt, "2-L2A_data")
    image = pixels(path)
    rewrite(path, (image * 10_000).astype(np.uint16))
    assert refusal(spoilt).reason == "wrong-type"
    rewrite(path, image[:11])
    assert refusal(spoilt, replace(THREE, bands="all")).reason == "wrong-bands"
    assert make_sample(first(spoilt), THREE)
    rewrite(path, image[:3])
    assert refusal(spoilt).reason == "wrong-bands"


def test_a_mask_of_impossible_values_is_told(spoilt: World) -> None:
    path = path_of(spoilt, "2-CLM")
    rewrite(path, pixels(path) - 1)
    assert refusal(spoilt).reason == "wrong-type"
    assert "values from -1" in refusal(spoilt).detail


def test_a_mask_of_complex_numbers_is_told(spoilt: World) -> None:
    path = path_of(spoilt, "2-CLM")
    rewrite(path, pixels(path).astype(np.complex64))
    assert refusal(spoilt).reason == "wrong-type"


@pytest.mark.parametrize("cover", ["NaN", "-1", "1e400", "1" + "0" * 400, '"much"'])
def test_an_impossible_cloud_cover_is_no_cloud_cover(spoilt: World, cover: str) -> None:
    path_of(spoilt, "1-metadata").write_text(f'{{"cloud_cover": {cover}, "datetime": "2020-01-02"}}')
    revisit = read_scene(first(spoilt), THREE).revisits[0]
    assert (revisit.cloud_cover, revisit.date) == (None, "2020-01-02")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["1-L2A_data", "1-CLM"])
def test_what_is_not_finite_is_told(spoilt: World, which: str, value: float) -> None:
    path = path_of(spoilt, which)
    image = pixels(path)
    image[min(3, len(image) - 1), 5, 5] = value
    rewrite(path, image)
    assert refusal(spoilt).reason == "not-finite"
    assert path.name in refusal(spoilt).detail


@pytest.mark.parametrize("which", ["ps", "pan", "2-L2A_data"])
def test_images_without_data_are_told(spoilt: World, which: str) -> None:
    path = path_of(spoilt, which)
    rewrite(path, np.zeros_like(pixels(path)))
    assert refusal(spoilt).reason == "no-data"


def test_a_revisit_that_its_mask_calls_empty_is_told(spoilt: World) -> None:
    path = path_of(spoilt, "2-dataMask")
    rewrite(path, np.zeros_like(pixels(path)))
    assert refusal(spoilt).reason == "no-data"
    assert "revisit 2" in refusal(spoilt).detail


@pytest.mark.parametrize(("which", "band"), [("ps", 1), ("pan", 0), ("2-L2A_data", 3)])
@pytest.mark.parametrize("bordered", [False, True])
def test_constant_bands_are_told(spoilt: World, which: str, band: int, bordered: bool) -> None:
    path = path_of(spoilt, which)
    image = pixels(path)
    image[band] = image[band].max()
    if bordered:
        image[:, :9] = 0
        if which == "2-L2A_data":
            mask = pixels(path_of(spoilt, "2-dataMask"))
            mask[:, :9] = 0
            rewrite(path_of(spoilt, "2-dataMask"), mask)
    rewrite(path, image)
    assert refusal(spoilt).reason == "degenerate"
    assert f"band {band + 1} of" in refusal(spoilt).detail


def test_a_raster_that_claims_too_many_pixels_is_told(spoilt: World) -> None:
    path = path_of(spoilt, "pan")
    shape = {"width": 60_000, "height": 60_000, "count": 1, "dtype": "uint16"}
    rasterio.open(path, "w", driver="GTiff", sparse_ok=True, transform=Affine.scale(2), **shape).close()
    assert path.stat().st_size < 2 << 20
    assert refusal(spoilt).reason == "absurd-size"


def test_clouds_are_reported_and_exclude_only_on_request(spoilt: World) -> None:
    path = path_of(spoilt, "2-CLM")
    mask = np.zeros_like(pixels(path))
    for number in (1, 3):
        rewrite(path_of(spoilt, f"{number}-CLM"), mask)
    mask[:, : mask.shape[1] // 2] = 1
    mask[:, -3:] = 255
    rewrite(path, mask)
    expected = 100 * (mask == 1).sum() / (mask < 2).sum()
    meta = make_sample(first(spoilt), THREE).meta
    assert meta["cloud_percent"] == pytest.approx(expected / 3, abs=1e-3)
    assert [revisit["cloud_percent"] for revisit in meta["revisits"]] == pytest.approx([0, expected, 0], abs=1e-3)  # type: ignore[attr-defined]
    assert make_sample(first(spoilt), replace(THREE, max_cloud=expected / 3 + 0.1))
    error = refusal(spoilt, replace(THREE, max_cloud=expected / 3 - 0.1))
    assert error.reason == "too-cloudy"
    assert "the most is" in error.detail


def test_broken_metadata_is_told_and_missing_is_not(spoilt: World) -> None:
    path = path_of(spoilt, "1-metadata")
    path.write_text("{")
    assert refusal(spoilt).reason == "unreadable"
    path.unlink()
    assert read_scene(first(spoilt), THREE).revisits[0].date is None
