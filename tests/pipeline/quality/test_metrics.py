"""Metrics equal the published ones, and plain formulas in simple cases."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.quality.metrics import image_metrics
from pipeline.quality.names import ADJUSTED, METRICS
from tests.golden import cases
from tests.pipeline.quality.test_losses import assert_near, golden_pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_published_metrics(dtype: torch.dtype) -> None:
    golden = cases.load("losses")
    metrics = image_metrics(*golden_pair(dtype), registration="published")
    for name in ("mse", "mae", "psnr", "ssim", "sam", "ergas"):  # the golden values are those after bias adjustment
        assert_near(metrics[name + ADJUSTED], golden[name])


def test_every_metric_is_given_for_every_sample() -> None:
    metrics = image_metrics(*golden_pair())
    assert metrics.keys() == {name + suffix for name in METRICS for suffix in ("", ADJUSTED)}
    assert all(value.shape == (3,) and value.isfinite().all() for value in metrics.values())


def test_equal_images_are_perfect() -> None:
    _, target = golden_pair(torch.float64)
    metrics = image_metrics(target, target)
    for suffix in ("", ADJUSTED):
        assert metrics["mse" + suffix].max() < 1e-30
        assert metrics["psnr" + suffix].min() > 300
        torch.testing.assert_close(metrics["ssim" + suffix], torch.ones(3, dtype=torch.float64))
        assert metrics["sam" + suffix].max() < 0.05
        assert metrics["ergas" + suffix].max() < 1e-12
    assert metrics["psnr"].tolist() == [math.inf] * 3


def test_a_constant_offset_in_closed_form() -> None:
    target = torch.full((1, 3, 40, 40), 0.4, dtype=torch.float64)
    target[0, 2] = 0.2
    metrics = image_metrics(target + 0.1, target)
    assert metrics["mse"].item() == pytest.approx(0.01)
    assert metrics["mae"].item() == pytest.approx(0.1)
    assert metrics["psnr"].item() == pytest.approx(20)
    assert metrics["ergas"].item() == pytest.approx(25 * math.sqrt((2 * 0.0625 + 0.25) / 3), rel=1e-6)
    cosine = (0.5 * 0.4 * 2 + 0.3 * 0.2) / math.hypot(0.5, 0.5, 0.3) / 0.6
    assert metrics["sam"].item() == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-5)
    assert metrics["psnr_adjusted"].item() > 100
    assert metrics["mae_adjusted"].item() == pytest.approx(0, abs=1e-12)


def test_spectra_at_right_angles() -> None:
    prediction, target = torch.zeros(1, 3, 30, 30), torch.zeros(1, 3, 30, 30)
    prediction[:, 0], target[:, 1] = 0.3, 0.5
    assert image_metrics(prediction, target)["sam"].item() == pytest.approx(90)
    assert image_metrics(prediction, torch.zeros_like(target))["sam"].item() == pytest.approx(90)


def test_ssim_surrounds_the_image_by_zeros() -> None:
    flat = torch.full((1, 1, 40, 40), 0.5, dtype=torch.float64)
    ssim = image_metrics(flat + 0.1, flat)["ssim"].item()
    # Inside, only the luminance term counts; within 5 px of the border zeros make structure, which agrees.
    inside = (2 * 0.6 * 0.5 + 1e-4) / (0.6**2 + 0.5**2 + 1e-4)
    assert inside - 0.02 < ssim < 1
    assert ssim != pytest.approx(inside, abs=1e-4)


def test_a_moved_image_is_as_good_as_one_in_place() -> None:
    _, target = golden_pair(torch.float64)
    moved = target.roll((2, -1), (2, 3))
    assert image_metrics(moved, target)["psnr"].tolist() == [math.inf] * 3
    assert image_metrics(target.roll(3, 2), target)["psnr"].max() < 50


def test_bfloat16_is_compared_in_float32_without_a_graph() -> None:
    prediction, target = golden_pair()
    half = prediction.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        metrics = image_metrics(half.requires_grad_(), target)
    expected = image_metrics(half.detach().float(), target)
    assert all(torch.equal(metrics[name], expected[name]) for name in expected)
    assert not any(value.requires_grad for value in metrics.values())


def test_ergas_is_in_proportion_to_the_ratio_of_pixel_sizes() -> None:
    prediction, target = golden_pair()
    published = image_metrics(prediction, target)["ergas"]
    torch.testing.assert_close(image_metrics(prediction, target, ratio=0.5)["ergas"], 2 * published)
