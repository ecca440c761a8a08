from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

from sharding.prepare.options import STEP, SampleOptions
from sharding.prepare.scene import choose_revisits, prepare, quantise, rank_revisits
from sharding.sources.worldstrat.rasters import read_scene
from tests.sharding.conftest import World, aois_of

EIGHT = tuple(range(8))


def test_shapes_and_ranges(world: World) -> None:
    for source in ("ps", "rgbn"):
        options = SampleOptions(hr=source)
        prepared = prepare(read_scene(aois_of(world.folder)[0], options), EIGHT, options)
        assert prepared.lr.shape == (8, 3, 160, 160)
        assert prepared.clm.shape == (8, 1, 160, 160)
        assert set(np.unique(prepared.clm)) <= {0, 1}
        assert prepared.hr.shape == (3, 500, 500)
        assert prepared.pan.shape == (1, 500, 500)
        for image in (prepared.hr, prepared.pan):
            assert 0 <= image.min() <= image.max() <= 1


def test_native_keeps_every_grid(world: World) -> None:
    options = SampleOptions(hr="rgbn", lr_size=None, hr_size=None)
    scene = read_scene(aois_of(world.folder)[0], options)
    prepared = prepare(scene, (1, 4), options)
    assert np.array_equal(prepared.lr, scene.lr[[1, 4]])
    assert np.array_equal(prepared.clm, scene.clm[[1, 4]])
    assert prepared.pan.shape == (1, 264, 264)
    assert prepared.hr.shape == (3, 66, 66)
    assert np.array_equal(prepared.hr, np.clip(scene.hr, 0, 1))


def test_bands_are_red_green_blue(world: World) -> None:
    """The colours of LR are those of HR, and not those of HR with red and blue exchanged."""
    for aoi in aois_of(world.folder):
        scene = read_scene(aoi, SampleOptions())
        clearest = choose_revisits(scene, SampleOptions()).clearest
        prepared = prepare(scene, EIGHT, SampleOptions())
        lr, hr = prepared.lr[clearest].mean((1, 2)), prepared.hr.mean((1, 2))
        assert np.abs(lr - hr).sum() < np.abs(lr - hr[::-1]).sum()


def test_integers_are_within_half_a_step_and_saturation_is_counted() -> None:
    values = np.linspace(-0.001, 2.0, 10_001, dtype=np.float32).reshape(1, 73, 137)
    steps, saturated = quantise(values)
    kept = (values >= 0) & (values <= 1.966)
    assert np.abs(steps * STEP - values)[kept].max() <= STEP / 2 + 1e-7
    assert saturated == (values > (65535.5 * STEP)).sum() > 0
    assert steps[values < 0].max() == 0
    assert steps[values > 1.967].min() == 65535


def scenes(*levels: float) -> np.ndarray:
    """One flat revisit a level, with the same faint texture."""
    texture = np.random.default_rng(0).normal(0, 0.01, (1, 3, 20, 20))
    return (texture + np.array(levels)[:, None, None, None]).astype(np.float32)


def test_the_clearest_is_the_one_most_like_the_median() -> None:
    lr = scenes(0.9, 0.10, 0.12, 0.11, 0.2)
    assert rank_revisits(lr, np.ones((5, 1, 20, 20), bool)) == [2, 3, 1, 4, 0]


def test_a_tie_goes_to_the_lower_number() -> None:
    assert rank_revisits(scenes(0.2, 0.1, 0.1, 0.1), np.ones((4, 1, 20, 20), bool)) == [1, 2, 3, 0]


def test_masked_pixels_do_not_count() -> None:
    lr = scenes(0.30, 0.10, 0.12, 0.14, 0.02)
    lr[2, :, :12] = 0.8  # a cloud over the best
    usable = np.ones((5, 1, 20, 20), bool)
    assert rank_revisits(lr, usable)[0] == 3
    usable[2, :, :12] = False
    assert rank_revisits(lr, usable)[0] == 2


def test_scene_classes_mask_the_revisits_that_have_them(spoilt: World) -> None:
    """What one revisit's SCL calls a cloud does not count, though another revisit has no SCL."""
    options = SampleOptions(revisits=3)
    name, files = next((aoi.name, aoi.revisits) for aoi in aois_of(spoilt.folder) if "SCL" in aoi.revisits[1])
    Path(files[3]["SCL"].path).unlink()
    scene = read_scene(next(aoi for aoi in aois_of(spoilt.folder) if aoi.name == name), options)
    lr = scenes(0.10, 0.12, 0.14)
    lr[1, :, :12] = 0.8  # a cloud over the best
    ground = np.full((1, 20, 20), 4, np.uint8)
    cloud = ground.copy()
    cloud[:, :12] = 9
    clear = np.zeros((3, 1, 20, 20), np.uint8)
    scene = replace(scene, lr=lr, clm=clear, valid=clear == 0, scl=(ground, cloud, scene.scl[2]))
    assert scene.scl[2] is None
    assert choose_revisits(scene, options).clearest == 1
    assert choose_revisits(replace(scene, scl=(None, None, None)), options).clearest != 1


def test_the_measure_is_the_median_difference_to_the_median() -> None:
    """Against numpy's own medians with gaps, for every number of revisits, pixels that none shows, and all bands."""
    generator = np.random.default_rng(1)
    for revisits in range(1, 18):
        lr = generator.random((revisits, 2, 13, 11), dtype=np.float32)
        usable = generator.random((revisits, 1, 13, 11)) > 0.4
        usable[:, :, 0] = False
        seen = np.where(usable, lr, np.nan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            difference = np.nanmedian(np.abs(seen - np.nanmedian(seen, axis=0)).reshape(revisits, -1), axis=1)
        assert rank_revisits(lr, usable) == list(np.argsort(difference, kind="stable"))


def test_revisits_without_a_usable_pixel_come_last() -> None:
    assert rank_revisits(scenes(0.1, 0.2), np.zeros((2, 1, 20, 20), bool)) == [0, 1]
    usable = np.ones((4, 1, 20, 20), bool)
    usable[1] = False
    assert rank_revisits(scenes(0.1, 0.1, 0.3, 0.12), usable) == [3, 0, 2, 1]


def test_the_choice_does_not_depend_on_the_stored_bands(world: World) -> None:
    aoi = aois_of(world.folder)[0]
    for select in ("first", "clearest"):
        chosen = {
            choose_revisits(read_scene(aoi, options), options)
            for bands in ("true_color", "all")
            for options in [SampleOptions(bands=bands, select=select, revisits=5)]
        }
        assert len(chosen) == 1


def test_snow_covered_revisits_come_last(shared: Path) -> None:
    """Cloud cover alone takes revisit 7 of this AOI (0.84 %), which is white with snow."""
    aois = {aoi.name: aoi for aoi in aois_of(shared / "worldstrat-sample")}
    scene = read_scene(aois["Landcover-655933"], SampleOptions())
    snow = {index for index in EIGHT if np.median(scene.lr[index]) > 0.5}
    assert 6 in snow
    assert choose_revisits(scene, SampleOptions()).clearest == 3
    for revisits in range(1, 9 - len(snow)):
        chosen = choose_revisits(scene, SampleOptions(select="clearest", revisits=revisits))
        assert not snow & set(chosen.revisits)
        assert chosen.revisits[chosen.clearest] == 3
        assert list(chosen.revisits) == sorted(chosen.revisits)
