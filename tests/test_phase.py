"""The measure behind the figures on offsets: known movements are found to a twentieth of a pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.phase import offset
from sharding.sources.synthetic.terrain import make_land

MOVES = [(0.0, 0.0), (0.3, -0.7), (1.5, -1.0), (-3.02, 2.63), (-5.0, 0.11)]


def fourier(image: Tensor, dy: float, dx: float, blur: float = 0.0) -> Tensor:
    """Move [C, H, W] down and right by the phases of its spectrum, and blur it by a Gaussian of that deviation."""
    rows, columns = (torch.fft.fftfreq(length, dtype=torch.float64) for length in image.shape[-2:])
    phase = torch.exp(-2j * math.pi * (dy * rows.unsqueeze(1) + dx * columns))
    damping = torch.exp(-2 * (math.pi * blur) ** 2 * (rows.unsqueeze(1) ** 2 + columns**2))
    return torch.fft.ifft2(torch.fft.fft2(image.double()) * phase * damping).real


@pytest.fixture(scope="module")
def scenes() -> list[Tensor]:
    """Fields, woods, roads and houses, larger than what is compared: new land enters at the borders."""
    lands = [make_land(np.random.default_rng(seed), 420) for seed in range(4)]
    return [torch.nn.functional.avg_pool2d(torch.from_numpy(land.bands[:3]), 2) for land in lands]


@pytest.mark.parametrize("move", MOVES)
def test_moved_scenes_are_found_to_a_twentieth_of_a_pixel(scenes: list[Tensor], move: tuple[float, float]) -> None:
    for scene in scenes:
        found = offset(fourier(scene, *move)[:, 27:183, 27:183], scene[:, 27:183, 27:183])
        assert found == pytest.approx(move, abs=0.05)


@pytest.mark.parametrize("move", MOVES)
def test_blur_noise_and_brightness_cost_little(scenes: list[Tensor], move: tuple[float, float]) -> None:
    """As a fused image differs from HR: softer, a little noisy, brighter on one side."""
    generator = torch.Generator().manual_seed(0)
    tilt = torch.linspace(0.9, 1.15, 156)
    for scene in scenes:
        soft = fourier(scene, *move, blur=1.2)[:, 27:183, 27:183] * tilt
        soft += 0.002 * torch.randn(soft.shape, generator=generator, dtype=torch.float64)
        assert offset(soft, scene[:, 27:183, 27:183]) == pytest.approx(move, abs=0.1)


def test_noise_is_found_where_it_was_put() -> None:
    """Nothing of the window is left in it: neither zero nor the search's grid draws the result."""
    image = torch.rand(1, 200, 200, generator=torch.Generator().manual_seed(1))
    for dy, dx in ((0.013, 0.237), (-4.77, 7.41)):
        moved = fourier(image, dy, dx)[:, 20:180, 20:180]
        assert offset(moved, image[:, 20:180, 20:180]) == pytest.approx((dy, dx), abs=0.02)
