"""Measures without target: against formulas in numpy written apart, and cases with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.quality.degradation import GAIN, degrade
from pipeline.quality.no_reference import MEASURES, hypercomplex_quality, no_reference, quality

Array = NDArray[np.float64]

QUATERNIONS = {  # Hamilton's table: the product of units i and j is (sign, unit)
    (0, 0): (1, 0), (0, 1): (1, 1), (0, 2): (1, 2), (0, 3): (1, 3),
    (1, 0): (1, 1), (1, 1): (-1, 0), (1, 2): (1, 3), (1, 3): (-1, 2),
    (2, 0): (1, 2), (2, 1): (-1, 3), (2, 2): (-1, 0), (2, 3): (1, 1),
    (3, 0): (1, 3), (3, 1): (1, 2), (3, 2): (-1, 1), (3, 3): (-1, 0),
}  # fmt: skip


def scene(bands: int, side: int, seed: int = 0) -> torch.Tensor:
    """Return a smooth image [1, bands, side, side] of reflectances whose bands resemble each other."""
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.uniform(0.05, 0.5, (1, 1, side // 4, side // 4)))
    tint = torch.from_numpy(random.uniform(0.8, 1.2, (1, bands, side // 4, side // 4)))
    return torch.nn.functional.interpolate(coarse * tint, size=(side, side), mode="bicubic").clamp(0.01)


def q4(a: Array, b: Array) -> float:
    """Return Alparone's Q4 of one block [4, pixels], its quaternion products by Hamilton's table."""
    a = a - 0.0
    mean_a, mean_b = a.mean(1), b.mean(1)
    covariance = np.zeros(4)
    conjugate = np.array([1, -1, -1, -1])
    for (i, j), (sign, unit) in QUATERNIONS.items():
        product = ((a[i] - mean_a[i]) * conjugate[j] * (b[j] - mean_b[j])).mean()
        covariance[unit] += sign * product
    variance_a, variance_b = (((x.T - x.mean(1)) ** 2).sum(1).mean() for x in (a, b))
    length_a, length_b = np.linalg.norm(mean_a), np.linalg.norm(mean_b)
    structure = 2 * np.linalg.norm(covariance) / (variance_a + variance_b)
    return float(structure * 2 * length_a * length_b / (length_a**2 + length_b**2))


@pytest.mark.parametrize("bands", [3, 4])
def test_q2n_of_four_parts_is_q4_by_hamiltons_table(bands: int) -> None:
    a, b = scene(bands, 24), scene(bands, 24, 1)
    padded = [np.concatenate([x.numpy(), np.zeros((1, 4 - bands, 24, 24))], 1)[0] for x in (a, b)]
    blocks = [(slice(None), slice(r, r + 12), slice(c, c + 12)) for r in (0, 12) for c in (0, 12)]
    expected = np.mean([q4(*(x[block].reshape(4, -1) for x in padded)) for block in blocks])
    assert hypercomplex_quality(a, b, (2, 2)).item() == pytest.approx(expected, rel=1e-12)


def test_q_of_a_band_is_wang_and_boviks() -> None:
    a, b = scene(2, 30), scene(2, 30, 1)
    expected = []
    for x, y in zip(a[0].numpy(), b[0].numpy(), strict=True):
        covariance = np.cov(x.ravel(), y.ravel(), bias=True)
        means = x.mean() * y.mean(), x.mean() ** 2 + y.mean() ** 2
        expected.append(4 * covariance[0, 1] * means[0] / (covariance[0, 0] + covariance[1, 1]) / means[1])
    np.testing.assert_allclose(quality(a, b, (1, 1))[0], expected, rtol=1e-12)
    # Of one part, Q2n is Q without its sign.
    one = quality(a[:, :1], b[:, :1], (1, 1)).abs()
    np.testing.assert_allclose(hypercomplex_quality(a[:, :1], b[:, :1], (1, 1)), one[:, 0], rtol=1e-12)


def test_every_number_of_bands_is_1_for_equal_images_and_less_for_swapped_bands() -> None:
    for bands in (1, 2, 3, 5, 8):
        image = scene(bands, 32, bands)
        assert hypercomplex_quality(image, image, (1, 1)).item() == pytest.approx(1, abs=1e-12)
        if bands > 1:
            swapped = image.flip(1) * torch.linspace(0.5, 1.5, bands).view(1, -1, 1, 1)
            assert hypercomplex_quality(image, swapped, (1, 1)).item() < 0.98


def test_flat_and_black_images_have_finite_indexes() -> None:
    flat = torch.full((1, 3, 32, 32), 0.2, dtype=torch.float64)
    assert quality(flat, 2 * flat, (1, 1)).tolist() == [[pytest.approx(0.8)] * 3]
    assert hypercomplex_quality(flat, 2 * flat, (1, 1)).item() == pytest.approx(0.8)
    measured = no_reference(0 * flat, 0 * flat, 0 * flat[:, :1])
    assert [measured[name].item() for name in ("d_lambda", "d_s", "hqnr")] == [0, 0, 1]
    assert math.isnan(measured["pan_offset"].item())


def test_degraded_waves_have_the_gain_of_the_transfer_function() -> None:
    # At the coarse grid's Nyquist frequency the gain is GAIN; an interval of two coarse pixels sees both extremes.
    fine, coarse = 160, 40
    phase = torch.arange(fine, dtype=torch.float64) + 0.5
    wave = 1 + torch.sin(math.pi * phase / 4).expand(1, fine, fine)
    seen = degrade(wave, (coarse, coarse))[0, 20, 5:-5] - 1
    assert seen.abs().max().item() == pytest.approx(GAIN, rel=0.02)
    assert (seen[1:] * seen[:-1]).max() < 0
    flat = torch.full((2, 3, 156, 156), 0.3)
    assert torch.allclose(degrade(flat, (50, 50)), torch.full((2, 3, 50, 50), 0.3))


def test_an_image_whose_degradation_is_the_input_has_no_spectral_distortion() -> None:
    truth = scene(3, 128)
    lr, pan = degrade(truth, (32, 32)), truth.mean(1, keepdim=True)
    measured = no_reference(truth, lr, pan)
    assert measured.keys() == set(MEASURES)
    assert measured["d_lambda"].item() == pytest.approx(0, abs=1e-9)
    grey = no_reference(pan.expand_as(truth), lr, pan)
    assert grey["d_lambda"].item() > measured["d_lambda"].item() + 0.001
    for found in (measured, grey):
        assert found["hqnr"].item() == pytest.approx((1 - found["d_lambda"].item()) * (1 - found["d_s"].item()))


def test_a_moved_image_is_that_far_off() -> None:
    random = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 1, 140, 140, generator=random, dtype=torch.float64)
    land = degrade(noise, (140, 140), 0.5)[..., 6:-6, 6:-6]
    moved = land.roll((2, 3), (-2, -1))
    measured = no_reference(moved.expand(-1, 3, -1, -1), degrade(land, (64, 64)).expand(-1, 3, -1, -1), land)
    assert measured["pan_offset"].item() == pytest.approx(math.hypot(2, 3), abs=0.1)
    assert measured["lr_offset"].item() == pytest.approx(math.hypot(2, 3), abs=0.6)
    far = land.roll((30, 0), (-2, -1)).expand(-1, 3, -1, -1)
    assert math.isnan(no_reference(far, degrade(far, (64, 64)), land)["pan_offset"].item())
