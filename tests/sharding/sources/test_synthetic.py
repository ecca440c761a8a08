from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks.phase import offset
from sharding.prepare.options import SampleOptions
from sharding.prepare.scene import choose_revisits, prepare
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.sources.synthetic.terrain import make_land
from sharding.sources.worldstrat.files import open_source
from sharding.sources.worldstrat.layout import read_split_file
from sharding.sources.worldstrat.rasters import Scene, read_scene
from tests.sharding.conftest import World, aois_of


@pytest.fixture(scope="module")
def scenes(world: World) -> list[Scene]:
    return [read_scene(aoi, SampleOptions()) for aoi in aois_of(world.folder)]


def test_the_generator_is_a_function_of_the_seed(tiny: World, tmp_path: Path) -> None:
    def rasters(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*"))}

    assert write_worldstrat(tmp_path / "same", 6, seed=4, revisits=3, hr_side=80) == tiny.names
    assert rasters(tmp_path / "same") == rasters(tiny.folder)
    write_worldstrat(tmp_path / "other", 6, seed=5, revisits=3, hr_side=80)
    assert rasters(tmp_path / "other") != rasters(tiny.folder)


def test_it_has_the_published_shape(scenes: list[Scene], world: World) -> None:
    assert len({scene.lr.shape for scene in scenes}) > 1  # sizes differ between AOIs
    assert any(scene.lr.shape[2] != scene.lr.shape[3] for scene in scenes)
    assert {scene.scl[0] is None for scene in scenes} == {True, False}
    assert any(" " in name for name in world.names)
    assert {(scene.hr == 0).any() for scene in scenes} == {True, False}
    assert any(scene.clm.any() for scene in scenes)


def test_an_offset_moves_the_revisits_and_nothing_else(tmp_path: Path) -> None:
    """SPOT further down by 10 px of 1.5 m and left by 4: the land of the revisits lies as much up and right."""
    scenes = []
    for name, off in (("on", (0.0, 0.0)), ("off", (10.0, -4.0))):
        write_worldstrat(tmp_path / name, 1, seed=3, revisits=1, hr_side=528, offset=off)
        scenes.append(read_scene(aois_of(tmp_path / name)[0], SampleOptions(revisits=1)))
    assert np.array_equal(scenes[0].hr, scenes[1].hr)
    assert np.array_equal(scenes[0].pan, scenes[1].pan)
    before, after = (torch.from_numpy(scene.lr[0]) for scene in scenes)
    rows, columns = before.shape[-2:]
    assert offset(after, before, border=4) == pytest.approx((-10 * rows / 528, 4 * columns / 528), abs=0.05)


def test_a_split_file_lists_every_aoi(tmp_path: Path) -> None:
    names = write_worldstrat(tmp_path, 10, seed=0, revisits=1, hr_side=40, split_file=True)
    rows = read_split_file(open_source(tmp_path, "l2a"))
    assert rows is not None
    assert [name for name, _ in rows] == names
    assert [split for _, split in rows] == ["train"] * 8 + ["val", "test"]


def test_reflectances_are_those_of_land() -> None:
    land = make_land(np.random.default_rng(0), 264)
    red, green, blue, infrared = land.bands.mean((1, 2))
    assert 0.03 < blue < red < 0.3
    assert 0.03 < green < infrared < 0.5
    assert 0 <= land.greenness.min() <= land.greenness.max() <= 1


def test_pan_has_the_detail_of_hr(scenes: list[Scene]) -> None:
    """What PAN shows beyond 6 m is what the target shows beyond 6 m, so that a head has something to learn."""
    for scene in scenes:
        brightness = torch.from_numpy(scene.hr.astype(np.float32).mean(0))[None, None]
        pan = torch.from_numpy(scene.pan.astype(np.float32))[None]
        details = [image - functional.avg_pool2d(image, 5, 1, 2) for image in (brightness, pan)]
        assert np.corrcoef([item.flatten().numpy() for item in details])[0, 1] > 0.9


def test_revisits_show_the_land_of_hr(scenes: list[Scene]) -> None:
    for scene in scenes:
        chosen = choose_revisits(scene, SampleOptions())
        prepared = prepare(scene, chosen.revisits, SampleOptions())
        lr = torch.from_numpy(prepared.lr[chosen.clearest])[None]
        hr = functional.interpolate(torch.from_numpy(prepared.hr)[None], (160, 160), mode="area")
        inner = (slice(None), 0, slice(10, -10), slice(10, -10))
        assert np.corrcoef(lr[inner].flatten().numpy(), hr[inner].flatten().numpy())[0, 1] > 0.7


def test_clouds_are_white_where_the_mask_says_so(scenes: list[Scene]) -> None:
    bright = np.concatenate([scene.lr.mean(1, keepdims=True)[scene.clm > 0] for scene in scenes])
    clear = np.concatenate([scene.lr.mean(1, keepdims=True)[scene.clm == 0] for scene in scenes])
    assert np.median(bright) > 3 * np.median(clear)
