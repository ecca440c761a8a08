"""WorldStrat's layout with other contents: taken for what the files say, or refused with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.io import DatasetReader
from rasterio.transform import Affine

from cluster.cli import main
from sharding.errors import UnusableError, UserError
from sharding.format.index import Index
from sharding.format.layout import ArrayLayout, ChipGrid
from sharding.format.sample import fetch_sample
from sharding.format.writer import NewSample
from sharding.prepare.options import SampleOptions
from sharding.prepare.sample import make_sample
from sharding.sources.options import SourceOptions
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.sources.worldstrat.facts import clear_nodata
from sharding.sources.worldstrat.source import WorldStratSource
from sharding.storage import open_storage

OPTIONS = SampleOptions(revisits=2, lr_size=36, hr_size=120)
NATIVE = SampleOptions(revisits=2, lr_size=None, hr_size=None)
SPOT, LR = "hr_dataset/*/*_{}.tiff", "lr_dataset/*/L2A/*-L2A_data.tiff"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worldstrat")
    write_worldstrat(folder, 1, 7, revisits=2, hr_side=240)
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "in"))


def change(
    folder: Path, pattern: str, edit: Callable[[NDArray[np.generic]], NDArray[np.generic]], **more: object
) -> None:
    """Change the pixels and the profile of files; `names` are the bands' descriptions."""
    names = more.pop("names", None)
    for path in folder.glob(pattern):
        with rasterio.open(path) as file:
            image, profile = edit(file.read()), dict(file.profile)
        profile.update(count=len(image), dtype=image.dtype.name, height=image.shape[1], width=image.shape[2])
        profile.update(more)
        path.unlink()
        with rasterio.open(path, "w", **profile) as file:
            file.write(image)
            if names:
                file.descriptions = names


def made(folder: Path, sample: SampleOptions = OPTIONS, **options: object) -> NewSample:
    source = WorldStratSource(folder, sample, SourceOptions(**options))  # type: ignore[arg-type]
    (aoi,) = source.scenes
    aoi.check(sample)
    return make_sample(aoi, sample)


def test_digital_numbers_are_refused_with_the_factor_that_fits(folder: Path) -> None:
    change(folder, LR, lambda x: (x * 10_000 + 1000).astype(np.float32))
    with pytest.raises(UnusableError, match=r"implausible: half of revisit 1 .* a scale of 0\.0001 would make it"):
        made(folder)


def test_digital_numbers_are_right_with_their_scale(base: Path, folder: Path) -> None:
    change(folder, LR, lambda x: np.round(x * 10_000 + 1000).astype(np.uint16))
    with pytest.raises(UnusableError, match=r"wrong-type: .* holds uint16, reflectance is float32: give --scale"):
        made(folder)
    lr, usual = (
        made(place, **more).images["lr"] for place, more in ((folder, {"scale": 1e-4, "offset": -0.1}), (base, {}))
    )
    assert np.abs(lr.astype(int) - usual.astype(int)).max() <= 3  # of 3e-5: the rounding of the counts


def test_reflectance_below_zero_is_refused(folder: Path) -> None:
    change(folder, LR, lambda x: x - np.float32(0.4))
    with pytest.raises(UnusableError, match="implausible: half of revisit 1 is below 0"):
        made(folder)


def test_some_negative_values_are_counted(folder: Path) -> None:
    def dip(x: NDArray[np.float32]) -> NDArray[np.float32]:
        x[3, 5, 5:8] = -0.01
        return x

    change(folder, LR, dip)
    assert made(folder).meta["negative"] == {"lr": 6}


@pytest.mark.parametrize("kind", ["lr", "hr"])
def test_a_nodata_tag_is_honoured_and_not_smeared(base: Path, folder: Path, kind: str) -> None:
    def corner(x: NDArray[np.generic], value: float, side: int) -> NDArray[np.generic]:
        x[:, :side, :side] = value
        return x

    if kind == "lr":
        change(folder, LR, lambda x: corner(x, -9999, 10), nodata=-9999)
        for path in folder.glob("lr_dataset/*/L2A/*dataMask*"):
            path.unlink()
    else:
        change(folder, SPOT.format("ps"), lambda x: corner(x, 65535, 40), nodata=65535)
    sample, usual = made(folder), made(base)
    mine, theirs = (item.images[kind].astype(int)[..., 0, :, :] for item in (sample, usual))
    side = mine.shape[-1] * (10 / 36 if kind == "lr" else 40 / 240)
    assert (mine[..., : int(side) - 1, : int(side) - 1] == 0).all()
    beyond = int(side) + 2
    assert (mine[..., beyond:, :] == theirs[..., beyond:, :]).all()
    near = mine[mine > 0]
    assert near.min() >= 0.8 * theirs.min()  # nothing between black and land
    assert near.max() <= 1.01 * theirs.max()


def test_a_mask_of_data_is_stored_on_request(base: Path, folder: Path) -> None:
    def corner(x: NDArray[np.generic]) -> NDArray[np.generic]:
        x[:, :40, :40] = 0
        return x

    change(folder, SPOT.format("ps"), corner)
    usual, masked = made(folder), made(folder, mask_nodata=True)
    assert set(masked.images) == {*usual.images, "valid"}
    wanted = np.ones((1, 120, 120), np.uint8)
    wanted[0, :20, :20] = 0
    assert np.array_equal(masked.images["valid"], wanted)
    target, whole = masked.images["hr"].astype(int), made(base).images["hr"].astype(int)
    assert (target[:, wanted[0] == 0] == 0).all()
    assert target[:, 20, :20].min() >= 0.8 * whole[:, 20:22, :20].min(), "0 is not mixed into land"
    assert usual.images["hr"][:, 20, 5].max() < 0.95 * whole[:, 20, 5].max(), "as in the published pipeline"
    assert np.array_equal(target[:, 22:], whole[:, 22:])


def test_a_dataset_with_the_mask_is_verified_and_its_leaks_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    write_worldstrat(folder, 3, 7, revisits=2, hr_side=80)
    change(folder, LR, lambda x: x, crs="EPSG:4326", transform=Affine(1e-4, 0, 11, 0, -1e-4, 50))
    arguments = ["--input", str(folder), "--output", str(output), "--revisits", "2", "--lr-size", "20"]
    options = ["--hr-size", "40", "--mask-nodata", "--workers", "1"]
    assert main(["shard", *arguments, *options]) == 0
    index = Index.load(open_storage(output))
    assert index.facts.masks == ("clm", "valid")
    assert index.facts.options == {"mask_nodata": True}
    shard, entry = index.samples("train")[0]
    sample = fetch_sample(open_storage(output), shard, entry)
    assert sample.valid is not None
    assert np.array_equal(sample.valid, np.ones((1, 40, 40)))
    capsys.readouterr()
    assert main(["verify", str(output), "--deep", "--input", str(folder), "--num-aois", "3"]) == 0
    leaks = [line for line in capsys.readouterr().out.splitlines() if line.startswith("leak between splits: AOI ")]
    assert len(leaks) == 3, "each pair shows the same land in two splits"
    assert all(line.endswith("show the same land") for line in leaks)
    assert main(["inspect", str(output)]) == 0
    assert capsys.readouterr().out.count("show the same land") == 3
    again = [option for option in options if option != "--mask-nodata"]
    assert main(["shard", *arguments, *again]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_nodata_tag_that_the_type_cannot_hold_hides_no_pixel(folder: Path) -> None:
    def stored(x: NDArray[np.generic]) -> NDArray[np.generic]:
        x[:, :40, :40] = -9999 % 65536
        return x

    change(folder, SPOT.format("ps"), stored)
    with rasterio.open(next(folder.glob(SPOT.format("ps")))) as file:
        image = file.read()
    # GDAL writes no such tag, but reads files of others.
    assert not clear_nodata(cast(DatasetReader, SimpleNamespace(nodata=-9999.0)), image)
    assert (image[:, :40, :40] == -9999 % 65536).all()


def test_values_at_the_limit_of_their_type_are_counted(folder: Path) -> None:
    def bright(x: NDArray[np.generic]) -> NDArray[np.generic]:
        x[:3, 20, 20:23] = 65535
        return x

    assert "at_limit" not in made(folder).meta
    change(folder, SPOT.format("ps"), bright)
    change(folder, LR, lambda x: bright(np.round(x * 10_000).astype(np.uint16)))
    assert made(folder, scale=1e-4).meta["at_limit"] == {"hr": 9, "lr": 2 * 6}  # of the revisits' bands 2, 3 and 4


def test_an_offset_may_begin_on_a_day(base: Path, folder: Path) -> None:
    """The first of the two revisits is the later one, and has the offset of later products."""
    change(folder, "lr_dataset/*/L2A/*-1-L2A_data.tiff", lambda x: x + np.float32(0.1))
    usual = made(base)
    days = [revisit["date"] for revisit in usual.meta["revisits"]]  # type: ignore[attr-defined]
    assert days[0] > days[1]
    sample = made(folder, offset=-0.1, offset_since=days[0])
    assert np.abs(sample.images["lr"].astype(int) - usual.images["lr"].astype(int)).max() <= 1
    assert sample.meta["clearest"] == usual.meta["clearest"]
    assert (made(folder).images["lr"][0] > usual.images["lr"][0] + 3000).all(), "unasked it stays as it is"
    for path in folder.glob("lr_dataset/*/L2A/*-2.metadata"):
        path.unlink()
    with pytest.raises(UnusableError, match="no-date: revisit 2 has no date, which --offset-since needs"):
        made(folder, offset=-0.1, offset_since=days[0])
    with pytest.raises(UserError, match="--offset-since '2022' needs a day YYYY-MM-DD, and --offset"):
        SourceOptions(offset=-0.1, offset_since="2022")


def test_larger_rasters_are_not_shrunk_unasked(folder: Path) -> None:
    change(folder, "*/*/**/*.tiff", lambda x: np.tile(x, (1, 7, 7)))
    with pytest.raises(
        UnusableError, match=r"size-mismatch: .*-1-L2A_data.tiff is 280 x 266 px, .* not shrunk unasked"
    ):
        made(folder, SampleOptions(revisits=2))
    native = made(folder, NATIVE)
    layout = {name: ArrayLayout(image.shape, "<u2") for name, image in native.images.items()}
    facts = WorldStratSource(folder, NATIVE, SourceOptions()).facts(NATIVE, [layout])
    assert native.images["lr"].shape == (2, 3, 280, 266)
    assert facts.chips == ChipGrid(50, 50, columns=5, rows=5)


def test_a_target_of_half_the_pixels_of_pan_is_taken(base: Path, folder: Path) -> None:
    change(folder, SPOT.format("rgbn"), lambda x: x.repeat(2, -1).repeat(2, -2))
    half = SampleOptions(revisits=2, lr_size=60, hr_size=120, hr="rgbn")
    sample, usual = made(folder, half), made(base, half)
    assert np.array_equal(sample.images["pan"], usual.images["pan"])
    with rasterio.open(next(folder.glob(SPOT.format("rgbn")))) as file:
        expected = file.read([1, 2, 3]) / 10_000
    assert np.abs(sample.images["hr"] * 3e-5 - expected).max() < 2e-5
    with pytest.raises(UserError, match=r"--native with --hr rgbn would keep targets of 6 m beside PAN of 1\.5 m"):
        made(folder, SampleOptions(revisits=2, lr_size=None, hr_size=None, hr="rgbn"))


def test_few_revisits_are_repeated_if_asked(folder: Path) -> None:
    eight = SampleOptions(revisits=8, lr_size=36, hr_size=120)
    with pytest.raises(UnusableError, match="too-few-revisits: 2 revisits where 8 are needed"):
        made(folder, eight)
    sample = made(folder, eight, few_revisits="repeat")
    numbers = [revisit["number"] for revisit in sample.meta["revisits"]]  # type: ignore[attr-defined]
    assert numbers == [1, 1, 1, 1, 2, 2, 2, 2]
    images = made(folder).images["lr"]
    assert np.array_equal(sample.images["lr"], images[[0, 0, 0, 0, 1, 1, 1, 1]])


def test_bands_are_taken_by_name(base: Path, folder: Path) -> None:
    change(folder, SPOT.format("ps"), lambda x: x[[2, 1, 0, 3]], names=("blue", "green", "red", "nir"))
    change(folder, LR, lambda x: x[[1, 2, 3, 7]], names=("B02", "B03", "B04", "B08"))
    mine, theirs = made(folder), made(base)
    for name in ("lr", "hr"):
        assert np.array_equal(mine.images[name], theirs.images[name])


def test_a_band_that_is_missing_by_name_is_refused(folder: Path) -> None:
    change(folder, LR, lambda x: x[[1, 2, 4, 7]], names=("B02", "B03", "B05", "B08"))
    with pytest.raises(UnusableError, match=r"wrong-bands: .* has no band 'red': it has blue, green, rededge071, nir"):
        made(folder)


def test_rasters_that_lie_elsewhere_are_refused_with_the_distance(folder: Path) -> None:
    change(folder, SPOT.format("ps"), lambda x: x, crs="EPSG:4326", transform=Affine(1.5e-5, 0, 10, 0, -1.5e-5, 50))
    change(folder, LR, lambda x: x, transform=Affine(1e-4, 0, 11, 0, -1e-4, 50))
    with pytest.raises(UnusableError, match=r"no-overlap: .*_ps\.tiff lies 71\.[0-9] km from the revisits"):
        made(folder)


def test_no_coordinate_system_is_none(folder: Path) -> None:
    change(folder, LR, lambda x: x, crs=None, transform=Affine.identity())
    assert made(folder).meta["crs"] is None


def test_the_nearest_revisit_in_date_is_chosen(base: Path) -> None:
    one = SampleOptions(revisits=1, select="nearest", lr_size=36, hr_size=120)
    (aoi,) = WorldStratSource(base, one, SourceOptions()).scenes
    meta = make_sample(aoi, one).meta
    days = [revisit["date"] for revisit in make_sample(aoi, OPTIONS).meta["revisits"]]  # type: ignore[attr-defined]
    day = np.datetime64(meta["hr_date"])  # type: ignore[call-overload]
    nearest = min(days, key=lambda text: abs(np.datetime64(text) - day))
    assert [revisit["date"] for revisit in meta["revisits"]] == [nearest]  # type: ignore[attr-defined]


def test_agreement_tells_which_revisit_shows_other_land(folder: Path) -> None:
    usual = made(folder, NATIVE).content
    assert usual is not None
    assert usual.correlation is not None
    assert usual.correlation > 0.8
    assert len(usual.revisits) == 2
    assert usual.land is not None
    change(folder, "lr_dataset/*/L2A/*-2-L2A_data.tiff", lambda x: np.ascontiguousarray(x[:, ::-1, ::-1]))
    content = made(folder, NATIVE).content
    assert content is not None
    first, second = content.revisits
    assert first == usual.revisits[0]
    assert second is not None
    assert second < 0.5
