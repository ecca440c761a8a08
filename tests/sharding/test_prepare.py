from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from sharding.prepare import clearest_revisit, prepare, quantise
from sharding.schema import STEP
from sharding.worldstrat import find_aois, read_scene
from tests.sharding.conftest import World


def test_shapes_and_ranges(world: World) -> None:
    for source in ("ps", "rgbn"):
        prepared = prepare(read_scene(find_aois(world.folder)[0], source, 8))
        assert prepared.lr.shape == (8, 3, 160, 160)
        assert prepared.clm.shape == (8, 1, 160, 160)
        assert set(np.unique(prepared.clm)) <= {0, 1}
        assert prepared.hr.shape == (3, 500, 500)
        assert prepared.pan.shape == (1, 500, 500)
        for image in (prepared.hr, prepared.pan):
            assert 0 <= image.min() <= image.max() <= 1


def test_bands_are_red_green_blue(world: World) -> None:
    """The colours of LR are those of HR, and not those of HR with red and blue exchanged."""
    for aoi in find_aois(world.folder):
        prepared = prepare(read_scene(aoi, "ps", 8))
        lr, hr = prepared.lr[prepared.clearest].mean((1, 2)), prepared.hr.mean((1, 2))
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
    assert clearest_revisit(lr, np.ones((5, 1, 20, 20), bool)) == 2


def test_a_tie_goes_to_the_lower_number() -> None:
    assert clearest_revisit(scenes(0.2, 0.1, 0.1, 0.1), np.ones((4, 1, 20, 20), bool)) == 1


def test_masked_pixels_do_not_count() -> None:
    lr = scenes(0.30, 0.10, 0.12, 0.14, 0.02)
    lr[2, :, :12] = 0.8  # a cloud over the best
    usable = np.ones((5, 1, 20, 20), bool)
    assert clearest_revisit(lr, usable) == 3
    usable[2, :, :12] = False
    assert clearest_revisit(lr, usable) == 2


def test_scene_classes_mask_the_revisits_that_have_them(spoilt: World) -> None:
    """What one revisit's SCL calls a cloud does not count, though another revisit has no SCL."""
    aoi = next(aoi for aoi in find_aois(spoilt.folder) if "SCL" in aoi.revisits[1])
    aoi.revisits[3]["SCL"].unlink()
    scene = read_scene(next(other for other in find_aois(spoilt.folder) if other.name == aoi.name), "ps", 3)
    lr = scenes(0.10, 0.12, 0.14)
    lr[1, :, :12] = 0.8  # a cloud over the best
    ground = np.full((1, 20, 20), 4, np.uint8)
    cloud = ground.copy()
    cloud[:, :12] = 9
    clear = np.zeros((3, 1, 20, 20), np.uint8)
    scene = replace(scene, lr=lr, clm=clear, valid=clear + 1, scl=(ground, cloud, scene.scl[2]))
    assert scene.scl[2] is None
    assert prepare(scene).clearest == 1
    assert prepare(replace(scene, scl=(None, None, None))).clearest != 1


def test_without_a_usable_pixel_it_is_the_first() -> None:
    assert clearest_revisit(scenes(0.1, 0.2), np.zeros((2, 1, 20, 20), bool)) == 0


def test_a_snow_covered_revisit_is_not_the_clearest(shared: Path) -> None:
    """Cloud cover alone takes revisit 7 of this AOI (0.84 %), which is white with snow."""
    aois = {aoi.name: aoi for aoi in find_aois(shared / "worldstrat-sample")}
    prepared = prepare(read_scene(aois["Landcover-655933"], "ps", 8))
    snow = [number for number in range(8) if np.median(prepared.lr[number]) > 0.5]
    assert 6 in snow
    assert prepared.clearest not in snow
    assert prepared.clearest == 3
