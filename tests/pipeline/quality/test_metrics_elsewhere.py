"""Metrics against independent implementations: scikit-image and torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchmetrics.functional.image import (
    error_relative_global_dimensionless_synthesis,
    spectral_angle_mapper,
    structural_similarity_index_measure,
)

from pipeline.quality.degradation import degrade
from pipeline.quality.metrics import image_metrics
from pipeline.quality.registration import HALF_WIDTH
from pipeline.quality.similarity import ssim_map

BORDER = 5
"""Half of SSIM's window of 11 px: implementations differ in how they go on beyond the image."""


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    """Return a target [1, 4, 70, 64] and an image that is blurred, noisy and in place."""
    random = torch.Generator().manual_seed(5)
    target = 0.1 + 0.5 * degrade(torch.rand(1, 4, 140, 128, generator=random, dtype=torch.float64), (70, 64))
    noise = torch.randn(target.shape, generator=random, dtype=torch.float64)
    return 0.9 * target + 0.02 + 0.01 * noise, target


def test_metrics_are_those_of_other_libraries(pair: tuple[Tensor, Tensor]) -> None:
    found = {name: value.item() for name, value in image_metrics(*pair, ratio=0.25).items()}
    # Registration leaves out a border, and these images are in place.
    image, target = (each[..., HALF_WIDTH:-HALF_WIDTH, HALF_WIDTH:-HALF_WIDTH] for each in pair)
    a, b = image[0].numpy(), target[0].numpy()
    assert found["mse"] == pytest.approx(mean_squared_error(a, b), rel=1e-12)
    assert found["psnr"] == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1), rel=1e-12)
    angles = spectral_angle_mapper(image, target, reduction="none")
    # Ours adds 1e-8 to the product of the lengths, so that black pixels have an angle.
    assert found["sam"] == pytest.approx(math.degrees(angles.mean().item()), rel=1e-4)
    # torchmetrics' ratio is low resolution over high, and its formula is 100 / ratio.
    assert found["ergas"] == pytest.approx(
        error_relative_global_dimensionless_synthesis(image, target, ratio=4).item(), rel=1e-5
    )


def test_ssim_is_that_of_other_libraries_inside_the_border(pair: tuple[Tensor, Tensor]) -> None:
    inside = (..., slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    ours = ssim_map(*pair, 11, mirror=False)[inside]
    _, theirs = structural_similarity(
        pair[0][0].numpy(),
        pair[1][0].numpy(),
        channel_axis=0,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    torch.testing.assert_close(ours[0], torch.from_numpy(theirs)[inside], rtol=1e-9, atol=1e-12)
    _, other = structural_similarity_index_measure(*pair, sigma=1.5, data_range=1.0, return_full_image=True)
    assert other[inside].mean().item() == pytest.approx(ours.mean().item(), rel=1e-6)
