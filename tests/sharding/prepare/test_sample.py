from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from sharding.errors import UnusableError, UserError
from sharding.format.writer import NewSample
from sharding.prepare.options import STEP, SampleOptions
from sharding.prepare.sample import make_sample
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.sources.worldstrat.files import open_source
from sharding.sources.worldstrat.layout import AoiFiles, check_files, find_aois
from tests.sharding.archives import pack
from tests.sharding.conftest import World, aois_of

NATIVE = SampleOptions(lr_size=None, hr_size=None)


@pytest.fixture(scope="module")
def aoi(world: World) -> AoiFiles:
    return next(aoi for aoi in aois_of(world.folder) if aoi.name == world.names[0])


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> World:
    """AOIs with the L1C product beside L2A."""
    folder = tmp_path_factory.mktemp("top")
    return World(folder, write_worldstrat(folder, 2, seed=4, revisits=3, hr_side=80, l1c=True))


def meta_of(sample: NewSample) -> dict[str, Any]:
    return dict(sample.meta)


def shapes(sample: NewSample) -> dict[str, tuple[int, ...]]:
    return {name: image.shape for name, image in sample.images.items()}


def test_the_default_is_the_published_preparation(aoi: AoiFiles) -> None:
    sample = make_sample(aoi, SampleOptions())
    assert shapes(sample) == {
        "lr": (8, 3, 160, 160),
        "clm": (8, 1, 160, 160),
        "hr": (3, 500, 500),
        "pan": (1, 500, 500),
    }
    assert {image.dtype for name, image in sample.images.items() if name != "clm"} == {np.dtype(np.uint16)}
    assert sample.images["clm"].dtype == np.uint8
    assert sample.meta["step"] == STEP
    assert sample.meta["bands"] == [4, 3, 2]
    assert sample.bytes_in == sum(file.size for file in aoi.used(SampleOptions()))


def test_integers_are_the_floats_within_half_a_step(aoi: AoiFiles) -> None:
    integers = make_sample(aoi, SampleOptions())
    floats = make_sample(aoi, SampleOptions(dtype="float32"))
    assert floats.meta["step"] == 1.0
    for name in ("lr", "hr", "pan"):
        assert floats.images[name].dtype == np.float32
        assert np.abs(integers.images[name] * STEP - floats.images[name]).max() <= STEP / 2 * (1 + 1e-9)
    assert np.array_equal(integers.images["clm"], floats.images["clm"])


def test_all_bands_hold_the_three(aoi: AoiFiles) -> None:
    three, every = make_sample(aoi, SampleOptions()), make_sample(aoi, SampleOptions(bands="all"))
    assert every.images["lr"].shape == (8, 12, 160, 160)
    assert every.meta["bands"] == list(range(1, 13))
    assert np.array_equal(every.images["lr"][:, [3, 2, 1]], three.images["lr"])
    assert every.meta["clearest"] == three.meta["clearest"]


def test_other_sizes(aoi: AoiFiles) -> None:
    sample = make_sample(aoi, SampleOptions(lr_size=40, hr_size=130))
    assert shapes(sample) == {"lr": (8, 3, 40, 40), "clm": (8, 1, 40, 40), "hr": (3, 130, 130), "pan": (1, 130, 130)}
    whole = make_sample(aoi, SampleOptions())
    for name in ("lr", "hr"):
        assert sample.images[name].mean() == pytest.approx(whole.images[name].mean(), rel=0.01)


@pytest.mark.parametrize("options", [SampleOptions(), NATIVE, replace(NATIVE, hr="rgbn"), SampleOptions(hr="rgbn")])
def test_transforms_cover_the_bounds_on_the_actual_grid(aoi: AoiFiles, options: SampleOptions) -> None:
    sample = make_sample(aoi, options)
    meta = meta_of(sample)
    west, south, east, north = meta["bounds"]
    for name in ("lr", "hr", "pan"):
        height, width = sample.images[name].shape[-2:]
        a, b, c, d, e, f = meta[f"{name}_transform"]
        assert (b, d, c, f) == (0, 0, west, north)
        assert math.isclose(c + a * width, east)
        assert math.isclose(f + e * height, south)


def test_native_keeps_the_rasters_own_values(aoi: AoiFiles) -> None:
    sample = make_sample(aoi, replace(NATIVE, hr="rgbn", dtype="float32"))
    assert sample.images["pan"].shape == (1, 264, 264)
    assert sample.images["hr"].shape == (3, 66, 66)
    with rasterio.open(aoi.revisits[2]["L2A_data"].path) as file:
        assert np.array_equal(sample.images["lr"][1], file.read([4, 3, 2]))
    with rasterio.open(aoi.hr["rgbn"].path) as file:
        assert np.array_equal(sample.images["hr"], file.read([1, 2, 3]).astype(np.float32) / 10_000)


def test_the_clearest_of_all_are_taken_in_numeric_order(world: World) -> None:
    """One clear and one cloudy half: the cloudy ones stay away, and the JSON says which were taken."""
    for aoi in aois_of(world.folder):
        every = meta_of(make_sample(aoi, SampleOptions()))
        three = make_sample(aoi, SampleOptions(select="clearest", revisits=3))
        meta = meta_of(three)
        numbers = [revisit["number"] for revisit in meta["revisits"]]
        assert numbers == sorted(numbers)
        best = every["revisits"][every["clearest"]]["number"]
        assert numbers[meta["clearest"]] == best
        whole = make_sample(aoi, SampleOptions())
        assert np.array_equal(three.images["lr"], whole.images["lr"][[number - 1 for number in numbers]])
        assert set(meta["sources"]) == set(every["sources"])


def test_what_is_not_chosen_may_be_empty(spoilt: World) -> None:
    """A revisit without data stays away by itself when others can be chosen."""
    aoi = next(aoi for aoi in aois_of(spoilt.folder) if aoi.name == spoilt.names[0])
    with rasterio.open(aoi.revisits[1]["L2A_data"].path, "r+") as file:
        file.write(np.zeros((file.count, *file.shape), np.float32))
    with pytest.raises(UnusableError, match="no-data: revisit 1 is all zero"):
        make_sample(aoi, SampleOptions(revisits=3))
    chosen = meta_of(make_sample(aoi, SampleOptions(revisits=2, select="clearest")))
    assert [revisit["number"] for revisit in chosen["revisits"]] == [2, 3]


def test_snow_is_not_among_the_clearest(shared: Path) -> None:
    aoi = next(aoi for aoi in aois_of(shared / "worldstrat-sample") if aoi.name == "Landcover-655933")
    sample = make_sample(aoi, SampleOptions(select="clearest", revisits=4))
    assert all(np.median(image) * STEP < 0.5 for image in sample.images["lr"])
    meta = meta_of(sample)
    assert meta["revisits"][meta["clearest"]]["number"] == 4
    assert 7 not in [revisit["number"] for revisit in meta["revisits"]]


def test_the_clearest_of_sixteen_are_chosen(shared: Path) -> None:
    aoi = next(aoi for aoi in aois_of(shared / "worldstrat-sample") if aoi.name.startswith("Amnesty"))
    options = SampleOptions(select="clearest")
    meta = meta_of(make_sample(aoi, options))
    assert len(meta["revisits"]) == 8
    assert len(meta["sources"]) == len(aoi.used(options)) == 2 + 16 * 4
    assert [revisit["number"] for revisit in meta["revisits"]] == [4, 6, 7, 8, 10, 12, 15, 16]
    assert meta["clearest"] == 1


def test_l1c_has_thirteen_bands_and_no_masks(top: World, tmp_path: Path) -> None:
    options = SampleOptions(level="l1c", bands="all", revisits=3)
    folder, zips = (find_aois(open_source(path, "l1c")) for path in (top.folder, pack(top.folder, tmp_path / "zips")))
    for ours, theirs in zip(folder, zips, strict=True):
        check_files(ours, options)
        sample = make_sample(ours, options)
        assert sample.images["lr"].shape == (3, 13, 160, 160)
        assert (sample.images["clm"] == 255).all()
        meta = meta_of(sample)
        assert meta["level"] == "l1c"
        assert meta["bands"] == list(range(1, 14))
        assert [revisit["has_clm"] for revisit in meta["revisits"]] == [False] * 3
        assert meta["cloud_percent"] is None
        assert meta == meta_of(make_sample(theirs, options))


def test_l1c_masks_are_used_where_they_are(top: World, tmp_path: Path) -> None:
    for source in sorted(top.folder.glob("lr_dataset/*/L2A/*-1-CLM.tiff")):
        target = tmp_path / source.relative_to(top.folder)
        target = Path(str(target).replace("L2A", "L1C"))
        target.parent.mkdir(parents=True)
        target.write_bytes(source.read_bytes())
        for data in (top.folder / "lr_dataset" / target.parts[-3] / "L1C").iterdir():
            (target.parent / data.name).write_bytes(data.read_bytes())
    (tmp_path / "hr_dataset").symlink_to(top.folder / "hr_dataset")
    for aoi in find_aois(open_source(tmp_path, "l1c")):
        sample = make_sample(aoi, SampleOptions(level="l1c", revisits=3))
        assert [revisit["has_clm"] for revisit in meta_of(sample)["revisits"]] == [True, False, False]
        assert (sample.images["clm"][0] < 2).all()
        assert (sample.images["clm"][1:] == 255).all()


def test_a_missing_product_is_too_few_revisits(tiny: World) -> None:
    (aoi, *_) = find_aois(open_source(tiny.folder, "l1c"))
    with pytest.raises(UnusableError, match="too-few-revisits: 0 revisits where 8 are needed"):
        check_files(aoi, SampleOptions(level="l1c"))


def test_a_native_grid_is_all_or_nothing() -> None:
    with pytest.raises(UserError, match="--native keeps both grids"):
        SampleOptions(lr_size=None)
    with pytest.raises(UserError, match=r"--max-cloud 101 is out of range"):
        SampleOptions(max_cloud=101)
    with pytest.raises(UserError, match=r"--level 'l3' is unknown: it may be l2a, l1c"):
        SampleOptions(level="l3")
