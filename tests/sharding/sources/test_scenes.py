"""A user's own scenes: where pixels land, which band is which, and what is refused with which reason."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.rpc import RPC
from rasterio.transform import Affine

from sharding.errors import UnusableError, UserError
from sharding.format.index import SPLITS, Index
from sharding.format.sample import Sample, fetch_sample
from sharding.prepare.options import SampleOptions
from sharding.run.dataset import shard_folder
from sharding.run.job import ShardOptions
from sharding.run.plan import PlanOptions
from sharding.run.verify import verify
from sharding.sources.options import SourceOptions
from sharding.sources.scenes.grid import Box, Grid, nice_ratio, tiles
from sharding.sources.scenes.header import Radiometry
from sharding.sources.scenes.layout import File
from sharding.sources.scenes.place import place_scene
from sharding.sources.scenes.products.read import read_header
from sharding.sources.scenes.raster import read_on_grid
from sharding.storage import open_storage
from tests.sharding.sources.sensors import EAST, NORTH, RGBN_TOML, counts, write_rgbn, write_tiff, write_two_crs

UTM = CRS.from_epsg(32631)
OPTIONS = ShardOptions(SampleOptions(revisits=2), PlanOptions(), SourceOptions(source="scenes"))


def field(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float32]:
    """A smooth image that is known at every point, in m."""
    return (0.3 + 0.1 * np.sin(x / 17) * np.cos(y / 23) + 0.05 * np.sin((x + y) / 11)).astype(np.float32)


def seen(transform: Affine, rows: int, columns: int) -> NDArray[np.float32]:
    column, row = np.meshgrid(np.arange(columns) + 0.5, np.arange(rows) + 0.5)
    return field(*(transform @ (column, row)))


GRID = Grid("EPSG:32631", 300.0, -300.0, 1.5, 1.5, 200, 200)


@pytest.mark.parametrize("shift", [0.0, 0.4, 0.75])
@pytest.mark.parametrize(
    ("place", "worst"),
    [
        (Affine.identity(), 2e-4),
        (Affine.rotation(7), 1e-3),
        (Affine(1, 0, 0, 0, -1, -1200), 2e-4),  # rows run north
    ],
)
def test_pixels_land_where_their_georeference_says(tmp_path: Path, shift: float, place: Affine, worst: float) -> None:
    transform = Affine.translation(shift, 0) @ place @ Affine.scale(1.5, -1.5)
    image = seen(transform, 800, 800)
    write_tiff(tmp_path / "a.tif", image[None], transform, UTM)
    header = read_header(File(tmp_path / "a.tif", "a.tif", 1))
    read, _ = read_on_grid(header, (1,), Radiometry(), GRID)
    assert np.abs(read[0] - seen(Affine(*GRID.transform), 200, 200)).max() < worst


def test_a_pixel_is_point_raster_begins_half_a_pixel_earlier(tmp_path: Path) -> None:
    transform = Affine(1.5, 0, 0, 0, -1.5, 0)
    write_tiff(tmp_path / "a.tif", seen(transform, 800, 800)[None], transform, UTM)
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.update_tags(AREA_OR_POINT="Point")
    header = read_header(File(tmp_path / "a.tif", "a.tif", 1))
    with rasterio.open(tmp_path / "a.tif") as file:
        assert header.transform == tuple(file.transform)[:6]


def test_pixels_without_data_are_not_smeared(tmp_path: Path) -> None:
    transform = Affine(1.5, 0, 0.7, 0, -1.5, 0)
    image = seen(transform, 800, 800)
    image[250:300, 250:300] = -9999
    write_tiff(tmp_path / "a.tif", image[None], transform, UTM, nodata=-9999)
    read, _ = read_on_grid(read_header(File(tmp_path / "a.tif", "a.tif", 1)), (1,), Radiometry(), GRID)
    missing = np.isnan(read[0])
    assert 2300 < missing.sum() < 2700
    assert np.abs(read[0] - seen(Affine(*GRID.transform), 200, 200))[~missing].max() < 0.02


def test_scale_offset_and_nodata_of_each_band(tmp_path: Path) -> None:
    image = np.full((2, 20, 20), 5000, np.uint16)
    image[0, 0, 0], image[1, 0, 1], image[0, 5, 5] = 7, 9, 65535
    write_tiff(tmp_path / "a.tif", image, Affine(1, 0, 0, 0, -1, 0), UTM)
    header = read_header(File(tmp_path / "a.tif", "a.tif", 1))
    grid = Grid("EPSG:32631", 0, 0, 1, 1, 20, 20)
    read, limit = read_on_grid(header, (1, 2), Radiometry(1e-4, -0.1, (7, 9)), grid)
    assert read[:, 10, 10].tolist() == pytest.approx([0.4, 0.4])
    assert np.isnan(read[:, 0, :2]).all()
    assert np.isnan(read).sum() == 4
    assert limit == 1


@pytest.mark.parametrize("kind", ["gcps", "rpcs"])
def test_ground_control_points_or_rpcs_alone_are_refused(tmp_path: Path, kind: str) -> None:
    points = [GroundControlPoint(row, column, column * 10, -row * 10) for row in (0, 9) for column in (0, 9)]
    line = [1.0] + [0.0] * 19
    rpcs = RPC(100.0, 100.0, 50.0, 0.1, line, line, 5.0, 5.0, 10.0, 0.1, line, line, 5.0, 5.0)
    places: dict[str, object] = {"crs": UTM, "gcps": points} if kind == "gcps" else {"rpcs": rpcs}
    profile = {"driver": "GTiff", "count": 1, "height": 10, "width": 10, "dtype": "uint16"}
    with rasterio.open(tmp_path / "a.tif", "w", **profile, **places) as file:
        file.write(np.ones((1, 10, 10), np.uint16))
    with pytest.raises(UnusableError, match="ground control points or RPCs only"):
        read_header(File(tmp_path / "a.tif", "a.tif", 1))


@pytest.mark.parametrize(
    ("measured", "ratio"),
    [(2.0, "2"), (3.125, "25/8"), (4.0, "4"), (6.6667, "20/3"), (6.68, "20/3"), (9.99, "10"), (1.2, "6/5")],
)
def test_ratios_are_taken_for_simple_fractions(measured: float, ratio: str) -> None:
    assert nice_ratio(measured) == Fraction(ratio)


def test_tiles_have_whole_pixels_and_keep_within_the_area() -> None:
    found = list(tiles(Box(3, 0, 4000, 3000), 1000, 0, Fraction(20, 3), (0.0, 0.0)))
    assert len(found) == 12
    assert {(box.x % 20, box.y % 20, box.width, box.height) for box in found} == {(0, 0, 1000, 1000)} or all(
        box.width == box.height == 1000 and box.x >= 3 and box.x + box.width <= 4003 for box in found
    )
    (small,) = tiles(Box(0, 0, 110, 95), 1000, 0, Fraction(20, 3), (0.0, 0.0))
    assert small == Box(0, 0, 100, 80)
    # A remainder of half a tile or more gets a tile at the edge, a smaller one does not.
    assert [box.x for box in tiles(Box(0, 0, 1500, 600), 600, 0, Fraction(4), (0.0, 0.0))] == [0, 600, 900]
    assert [box.x for box in tiles(Box(0, 0, 1480, 600), 600, 0, Fraction(4), (0.0, 0.0))] == [0, 600]
    assert [box.x for box in tiles(Box(0, 0, 1100, 600), 600, 200, Fraction(4), (0.0, 0.0))] == [0, 400]


@pytest.fixture(scope="module")
def rgbn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rgbn")
    write_rgbn(folder, 3, side=240)
    return folder


def sharded(folder: Path, output: Path, options: ShardOptions = OPTIONS) -> tuple[Index, dict[str, Sample]]:
    storage = open_storage(output)
    index = shard_folder(folder, storage, options, say=lambda line: None).index
    pairs = itertools.chain.from_iterable(index.samples(split) for split in SPLITS)
    return index, {entry.aoi: fetch_sample(storage, shard, entry) for shard, entry in pairs}


def test_a_sample_holds_the_files_pixels_band_by_band(rgbn: Path, tmp_path: Path) -> None:
    index, samples = sharded(rgbn, tmp_path / "out")
    assert index.facts.bands.lr == index.facts.bands.hr == ("red", "green", "blue", "nir")
    assert index.facts.ratio == (4, 1)
    assert len(samples) == 3
    sample = samples["scene0"]
    x, y, width, height = sample.meta["tile"]  # type: ignore[misc]
    with rasterio.open(rgbn / "scene0" / "ms.tif") as file:
        target = file.read()[:, y : y + height, x : x + width]
    assert np.abs(sample.hr * 3e-5 - target / 10_000).max() <= 1.6e-5
    with rasterio.open(rgbn / "scene0" / "pan.tif") as file:
        assert np.abs(sample.pan[0] * 3e-5 - file.read(1)[y : y + height, x : x + width] / 10_000).max() <= 1.6e-5
    # The revisits' files have another order of bands and origins of their own.
    coarse = (sample.hr * 3e-5).reshape(4, height // 4, 4, width // 4, 4).mean((2, 4))
    for revisit in sample.lr * 3e-5:
        for mine, theirs in zip(revisit, coarse, strict=True):
            assert np.corrcoef(mine[2:-2, 2:-2].ravel(), theirs[2:-2, 2:-2].ravel())[0, 1] > 0.96
    assert [revisit["date"] for revisit in sample.meta["revisits"]] == ["2020-05-11", "2020-06-11"]  # type: ignore[attr-defined]


def shift_between(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float]:
    """Return the shift of a against b by a least-squares fit of b's gradients, px."""
    gy, gx = np.gradient(b)
    inner = np.s_[4:-4, 4:-4]
    matrix = np.stack([gx[inner].ravel(), gy[inner].ravel()], 1)
    return tuple(-np.linalg.lstsq(matrix, (a - b)[inner].ravel(), rcond=None)[0])  # type: ignore[return-value]


@pytest.mark.parametrize(("dx", "dy"), [(0.0, 0.0), (0.4, -0.3), (-0.25, 0.5)])
def test_a_target_moved_by_a_known_amount_is_found_where_it_was_put(tmp_path: Path, dx: float, dy: float) -> None:
    """The target's georeference is that of the PAN, or off by dx, dy of its pixels while its pixels stay."""
    for number in range(3):
        west = 500_000 + 5_000 * number
        fine, coarse = Affine(2.5, 0, west, 0, -2.5, NORTH), Affine(10, 0, west, 0, -10, NORTH)
        place = tmp_path / "in" / f"scene{number}"
        local = Affine.translation(-west, -NORTH)
        image = seen(local @ fine, 160, 160)
        write_tiff(place / "pan.tif", counts(image[None]), fine, UTM)
        write_tiff(place / "ms.tif", counts(np.stack([image] * 4)), fine @ Affine.translation(dx, dy), UTM)
        small = seen(local @ coarse, 40, 40)
        for date in ("2020-01-01", "2020-02-02"):
            write_tiff(place / f"lr_{date}.tif", counts(np.stack([small] * 4)), coarse, UTM)
    (tmp_path / "in" / "scenes.toml").write_text(
        RGBN_TOML.replace('["red", "green", "blue", "nir"]', "[1, 2, 3, 4]") + "bands = [1, 2, 3, 4]\n"
    )
    _, samples = sharded(tmp_path / "in", tmp_path / "out")
    sample = samples["scene1"]
    moved = shift_between(sample.hr[0] * 3e-5, sample.pan[0] * 3e-5)
    assert moved == pytest.approx((dx, dy), abs=0.1)


def test_large_scenes_are_cut_and_their_tiles_stay_in_one_split(tmp_path: Path) -> None:
    write_two_crs(tmp_path / "in", [(400, 800), (400, 400), (400, 400)])
    source = SourceOptions(source="scenes", tile=300)
    index, samples = sharded(tmp_path / "in", tmp_path / "out", ShardOptions(OPTIONS.sample, PlanOptions(), source))
    assert index.facts.ratio == (20, 3)
    assert {sample.hr.shape for sample in samples.values()} == {(3, 300, 300)}
    assert {sample.lr.shape for sample in samples.values()} == {(2, 3, 45, 45)}
    assert index.facts.chips.size == 45
    splits: dict[str, set[str]] = {}
    for split in SPLITS:
        for _, entry in index.samples(split):
            splits.setdefault(entry.aoi.split("_x")[0], set()).add(split)
    assert len(splits) == 3
    assert all(len(found) == 1 for found in splits.values())
    for sample in samples.values():  # revisits lie in another UTM zone, and show what the target shows
        coarse = (sample.hr * 3e-5)[:, :280, :280].reshape(3, 14, 20, 14, 20).mean((2, 4))
        small = (sample.lr[0] * 3e-5)[:, :42, :42].reshape(3, 14, 3, 14, 3).mean((2, 4))
        assert np.corrcoef(coarse.ravel(), small.ravel())[0, 1] > 0.99


def test_scenes_that_overlap_go_into_one_split(tmp_path: Path) -> None:
    write_rgbn(tmp_path / "in", 5, side=120)
    # A copy of a scene, half of it over the first: nothing of the first may be in another split.
    for path in (tmp_path / "in" / "scene0").iterdir():
        with rasterio.open(path) as file:
            image, transform, names = file.read(), file.transform, file.descriptions
        moved = Affine.translation(150, 0) @ transform
        write_tiff(tmp_path / "in" / "twin" / path.name, image, moved, UTM, names=names)
    for seed in range(4):
        options = ShardOptions(OPTIONS.sample, PlanOptions(seed=seed), OPTIONS.source)
        index, _ = sharded(tmp_path / "in", tmp_path / f"out{seed}", options)
        where = {entry.aoi: split for split in SPLITS for _, entry in index.samples(split)}
        assert where["twin"] == where["scene0"]
        assert set(where.values()) == set(SPLITS)


def test_one_scene_cannot_fill_three_splits_but_its_blocks_can(tmp_path: Path) -> None:
    write_two_crs(tmp_path / "in", [(600, 600)])
    whole = ShardOptions(OPTIONS.sample, PlanOptions(), SourceOptions("scenes", tile=200))
    with pytest.raises(UserError, match="--split-by block"):
        sharded(tmp_path / "in", tmp_path / "out", whole)
    blocks = SourceOptions("scenes", tile=200, split_by="block", block_km=0.3)
    index, _ = sharded(tmp_path / "in", tmp_path / "out", ShardOptions(OPTIONS.sample, PlanOptions(), blocks))
    assert all(index.splits[split] for split in SPLITS)


def change(path: Path, edit: Callable[[NDArray[np.generic]], NDArray[np.generic]], **more: object) -> None:
    with rasterio.open(path) as file:
        image, transform, crs, names = file.read(), file.transform, file.crs, file.descriptions
    profile = {"transform": transform, "crs": crs, "names": names} | more
    write_tiff(path, edit(image), **profile)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("file", "edit", "more", "reason"),
    [
        ("ms.tif", lambda x: x[[2, 1, 0, 3]], {"names": ("R", "G", "B", "B05")}, "has no band 'N'"),
        ("lr_2020-05-11.tif", lambda x: x[:3], {"names": ("B02", "B03", "B04")}, "has no band 'nir'"),
        ("pan.tif", lambda x: x, {"transform": Affine(2.5, 0, 700_000, 0, -2.5, NORTH)}, "km from the panchromatic"),
        ("ms.tif", lambda x: x, {"crs": None}, "no coordinate system"),
        ("pan.tif", lambda x: x[:, :100], {"transform": Affine.identity(), "crs": None}, "no georeference"),
        ("pan.tif", lambda x: x * 0, {"nodata": 0}, "no-data: scene1/pan.tif holds no data"),
        ("ms.tif", lambda x: (x * 3).astype(np.float32) * 1e4, {}, "which is no reflectance"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(
    rgbn: Path,
    tmp_path: Path,
    file: str,
    edit: Callable[..., NDArray[np.generic]],
    more: dict[str, object],
    reason: str,
) -> None:
    write_rgbn(tmp_path / "in", 4, side=120)
    change(tmp_path / "in" / "scene1" / file, edit, **more)
    if file == "ms.tif" and "B05" in str(more):
        text = (tmp_path / "in" / "scenes.toml").read_text()
        (tmp_path / "in" / "scenes.toml").write_text(
            text.replace('ms.tif"\n', 'ms.tif"\nbands = ["R", "G", "B", "N"]\n')
        )
    index, samples = sharded(tmp_path / "in", tmp_path / "out")
    assert len(samples) == 3
    (skipped,) = index.skipped
    assert skipped.aoi == "scene1"
    assert reason in f"{skipped.reason}: {skipped.detail}"


def listed(rest: str) -> str:
    return f'[[scene]]\nname = "a"\npan = "scene0/pan.tif"\ntarget = "scene0/ms.tif"\n{rest}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[revisit]\n", "unknown key 'revisit'; did you mean 'revisits'"),
        (RGBN_TOML + "[masks]\nscale = 1\n", "unknown key 'masks.scale'"),
        (RGBN_TOML + 'date = "2020-05-01"\n', "unknown key 'target.date'"),
        (
            RGBN_TOML.replace("{date}", "*") + '[masks]\nfiles = "{scene}/lr_*.tif"\n',
            "for one revisit: give it the placeholders",
        ),
        (RGBN_TOML + '[masks]\nfiles = "{scene}/pan.tif"\n', "finds no revisit of these"),
        (listed('revisits = "scene0/lr_*.tif"\ndates = ["2020-01-01"]'), "has 3 revisits and 1 dates: give one"),
        (listed('revisits = "scene0/lr_*.tif"\nmasks = "scene0/[pm]*.tif"'), "has 3 revisits and 2 masks: give one"),
        (RGBN_TOML.replace("0.0001", '"x"', 1), "revisits.scale = 'x' must be a number"),
        (RGBN_TOML.replace("{scene}/pan", "{scene}/pam"), "matches no file"),
        (RGBN_TOML.replace("{scene}/pan", "../pan"), "leaves the folder"),
        (RGBN_TOML.replace("{scene}/pan", "*/pan"), "and one is needed"),
        (RGBN_TOML.replace("{scene}/pan", "{place}/pan"), "known are {scene}, {revisit} and {date}"),
        ("a = ", "cannot be read as TOML"),
    ],
)
def test_a_wrong_description_is_refused_by_key(rgbn: Path, tmp_path: Path, text: str, message: str) -> None:
    folder = tmp_path / "in"
    shutil.copytree(rgbn, folder)
    (folder / "scenes.toml").write_text(text)
    with pytest.raises(UserError) as error:
        sharded(folder, tmp_path / "out")
    assert message in str(error.value)


def test_an_offset_may_begin_on_a_day_if_that_is_asked_for(rgbn: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(rgbn, folder)
    text = (folder / "scenes.toml").read_text()
    three = ShardOptions(SampleOptions(revisits=3), PlanOptions(), SourceOptions(source="scenes"))
    _, usual = sharded(folder, tmp_path / "usual", three)
    told = "scale = 0.0001\noffset = 0.25\noffset_since = 2020-06-11\n"
    (folder / "scenes.toml").write_text(text.replace("scale = 0.0001\n", told, 1))
    _, found = sharded(folder, tmp_path / "out", three)
    for name, sample in found.items():
        moved = (sample.lr.astype(int) - usual[name].lr)[..., 5:-5, 5:-5] * 3e-5
        np.testing.assert_allclose(moved[0], 0, atol=1e-9)
        np.testing.assert_allclose(moved[1:], 0.25, atol=4e-5)


def test_too_few_revisits_are_refused_or_repeated(rgbn: Path, tmp_path: Path) -> None:
    many = SampleOptions(revisits=5)
    with pytest.raises(UserError, match="give --revisits 3, or --few-revisits repeat"):
        sharded(rgbn, tmp_path / "out", ShardOptions(many, PlanOptions(), OPTIONS.source))
    repeat = SourceOptions(source="scenes", few_revisits="repeat")
    _, samples = sharded(rgbn, tmp_path / "out", ShardOptions(many, PlanOptions(), repeat))
    lr = samples["scene0"].lr
    assert len(lr) == 5
    assert np.array_equal(lr[0], lr[1])
    assert not np.array_equal(lr[0], lr[2])


def test_a_blank_revisit_is_passed_over_while_others_remain(tmp_path: Path) -> None:
    write_rgbn(tmp_path / "in", 3, side=120)
    change(tmp_path / "in" / "scene1" / "lr_2020-05-11.tif", lambda x: x * 0, nodata=0)
    _, samples = sharded(tmp_path / "in", tmp_path / "out")
    dates = [revisit["date"] for revisit in samples["scene1"].meta["revisits"]]  # type: ignore[attr-defined]
    assert dates == ["2020-06-11", "2020-07-11"]


@pytest.mark.parametrize(
    ("source", "sample", "options", "message"),
    [
        ("scenes", {"level": "l1c"}, {}, "--level is an option of WorldStrat"),
        ("scenes", {}, {"scale": 2.0}, "--scale is an option of WorldStrat, and --source is scenes: drop it"),
        ("scenes", {}, {"bits": 11}, "--bits is an option of pancollection"),
        ("scenes", {}, {"block_km": 2.0}, "needs --split-by block"),
        ("worldstrat", {}, {"tile": 100}, "--tile is an option of scenes, and --source is worldstrat"),
        ("worldstrat", {}, {"split_by": "block"}, "--split-by is an option of scenes"),
        ("worldstrat", {}, {"bits": 11}, "--bits is an option of pancollection"),
        ("pancollection", {}, {"chip": 20}, "--chip is an option of scenes"),
        ("pancollection", {}, {"few_revisits": "repeat"}, "--few-revisits is an option of WorldStrat and scenes"),
        ("scenes", {}, {"mask_nodata": True}, "--mask-nodata is an option of WorldStrat, and --source is scenes"),
        ("pancollection", {"max_cloud": 3.0}, {}, "--max-cloud is an option of WorldStrat and scenes"),
    ],
)
def test_an_option_that_a_kind_would_ignore_is_refused(
    source: Literal["worldstrat", "scenes", "pancollection"],
    sample: dict[str, Any],
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        ShardOptions(SampleOptions(**sample), PlanOptions(), SourceOptions(source, **options))


def test_cloud_of_the_masks_arrives_at_its_pixels(tmp_path: Path) -> None:
    write_rgbn(tmp_path / "in", 3, side=120, dates=2)
    for path in sorted((tmp_path / "in").glob("*/lr_*.tif")):
        mask = np.zeros((1, 30, 30), np.uint8)
        mask[0, 10:14, 20:26], mask[0, 3, 4] = 9, 7
        with rasterio.open(path) as file:
            transform = file.transform
        write_tiff(path.with_name(path.name.replace("lr", "clm")), mask, transform, UTM, nodata=0)
    text = RGBN_TOML + '[masks]\nfiles = "{scene}/clm_{date}.tif"\ncloud = [9]\nunknown = [7]\n'
    (tmp_path / "in" / "scenes.toml").write_text(text)
    _, samples = sharded(tmp_path / "in", tmp_path / "out")
    for sample in samples.values():
        for clm in sample.clm:
            rows, columns = np.nonzero(clm[0] == 1)
            assert len(rows) == 24
            assert (np.ptp(rows), np.ptp(columns)) == (3, 5)
            (row,), (column,) = np.nonzero(clm[0, 1:-1, 1:-1] == 255)
            assert (rows.min() - row - 1, columns.min() - column - 1) == (7, 16)
        assert all(0 < revisit["cloud_cover"] < 5 for revisit in sample.meta["revisits"])  # type: ignore[attr-defined]


def test_a_value_without_data_that_the_type_cannot_hold_hides_no_pixel(tmp_path: Path) -> None:
    image = np.full((1, 20, 20), 5000, np.uint16)
    image[0, 0, 0] = 55537  # -9999 in 16 bits
    write_tiff(tmp_path / "a.tif", image, Affine(1, 0, 0, 0, -1, 0), UTM)
    header = read_header(File(tmp_path / "a.tif", "a.tif", 1))
    grid = Grid("EPSG:32631", 0, 0, 1, 1, 20, 20)
    for nodata, missing in ((-9999.0, 0), (0.5, 0), (55537.0, 1)):
        read, _ = read_on_grid(header, (1,), Radiometry(1e-4, 0.0, (nodata,)), grid)
        assert np.isnan(read).sum() == missing


@pytest.mark.parametrize("file", ["ms.tif", "lr_2020-05-11.tif"])
def test_bands_without_names_are_not_paired_by_position(tmp_path: Path, file: str) -> None:
    write_rgbn(tmp_path / "in", 4, side=120)
    text = (tmp_path / "in" / "scenes.toml").read_text().replace('bands = ["red", "green", "blue", "nir"]\n', "")
    (tmp_path / "in" / "scenes.toml").write_text(text)
    change(tmp_path / "in" / "scene1" / file, lambda x: x, names=None)
    index, _ = sharded(tmp_path / "in", tmp_path / "out")
    (skipped,) = index.skipped
    assert (skipped.aoi, skipped.reason) == ("scene1", "wrong-bands")
    kind = "target" if file == "ms.tif" else "revisits"
    assert f'order = ["red", "green", "blue"], below [{kind}]' in skipped.detail


def test_a_strip_that_images_barely_share_is_skipped_and_a_small_scene_sets_the_chips_aloud(tmp_path: Path) -> None:
    write_rgbn(tmp_path / "in", 4, side=240)
    with rasterio.open(tmp_path / "in" / "scene1" / "ms.tif") as ms:
        moved = Affine.translation(500, 0) * ms.transform  # 40 of 240 px remain
    change(tmp_path / "in" / "scene1" / "ms.tif", lambda x: x, transform=moved)
    change(tmp_path / "in" / "scene2" / "ms.tif", lambda x: x[:, :100, :100])
    lines: list[str] = []
    storage = open_storage(tmp_path / "out")
    index = shard_folder(tmp_path / "in", storage, OPTIONS, say=lines.append).index
    (skipped,) = index.skipped
    assert (skipped.aoi, skipped.reason) == ("scene1", "no-overlap")
    assert "less than half of a tile (600 px) and of the smallest image (240 x 240)" in skipped.detail
    assert index.facts.chips.size <= 25
    assert any("smallest sample sets the chips of all: 'scene2'" in line for line in lines)


def test_a_turned_pan_gives_no_pixels_beyond_its_land(tmp_path: Path) -> None:
    turned = Affine.translation(EAST + 40, NORTH - 10) @ Affine.rotation(-4) @ Affine.scale(2.5, -2.5)
    coarse = Affine(10, 0, EAST - 200, 0, -10, NORTH + 200)
    write_tiff(tmp_path / "pan.tif", np.ones((1, 200, 200), np.uint16), turned, UTM)
    write_tiff(tmp_path / "lr.tif", np.ones((3, 150, 150), np.uint16), coarse, UTM)
    write_tiff(tmp_path / "ms.tif", np.ones((3, 600, 600), np.uint16), coarse @ Affine.scale(0.25), UTM)
    pan, lr, ms = (read_header(File(tmp_path / name, name, 1)) for name in ("pan.tif", "lr.tif", "ms.tif"))
    place = place_scene(pan, ms, [lr])
    assert place.area.width > 150
    read, _ = read_on_grid(pan, (1,), Radiometry(), place.grid.part(place.area))
    assert np.isnan(read).mean() < 0.001


def test_verification_uses_the_options_of_the_source(tmp_path: Path) -> None:
    write_rgbn(tmp_path / "in", 3, side=240)
    source = SourceOptions("scenes", tile=120, overlap=40, few_revisits="repeat")
    sharded(tmp_path / "in", tmp_path / "out", ShardOptions(SampleOptions(revisits=4), PlanOptions(), source))
    storage = open_storage(tmp_path / "out")
    assert Index.load(storage).facts.options == {"tile": 120, "overlap": 40, "few_revisits": "repeat"}
    result = verify(storage, deep=True, folder=tmp_path / "in", num_aois=99)
    assert len(result.prepared) == 12
    assert result.problems == ()
    change(tmp_path / "in" / "scene0" / "pan.tif", lambda x: x + 1)
    assert "pan differs from the source" in str(verify(storage, folder=tmp_path / "in", num_aois=99).problems)
