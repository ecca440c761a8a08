"""Pansharpening baselines: against formulas in numpy written apart, and cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.evaluation.baselines import PANSHARPENED, baselines, brovey, gram_schmidt, mtf_glp
from pipeline.quality.degradation import degrade
from tests.pipeline.evaluation.batches import make_batch
from tests.pipeline.quality.test_no_reference import scene


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    """Enlarged bands [1, 3, 60, 60] and a PAN of other units and another mean."""
    return scene(3, 60), 0.3 + 2 * scene(1, 60, 5)


def matched(pan: np.ndarray, to: np.ndarray) -> np.ndarray:
    return (pan - pan.mean()) / pan.std() * to.std() + to.mean()


def test_brovey_keeps_the_ratios_of_the_bands(pair: tuple[Tensor, Tensor]) -> None:
    bands, pan = (image[0].numpy() for image in pair)
    intensity = bands.mean(0)
    np.testing.assert_allclose(brovey(*pair)[0], bands / intensity * matched(pan[0], intensity), rtol=1e-10)


def test_gram_schmidt_injects_by_covariance(pair: tuple[Tensor, Tensor]) -> None:
    bands, pan = (image[0].numpy() for image in pair)
    intensity = bands.mean(0)
    detail = matched(pan[0], intensity) - intensity
    gains = [np.cov(band.ravel(), intensity.ravel())[0, 1] / np.var(intensity, ddof=1) for band in bands]
    expected = [band + gain * detail for band, gain in zip(bands, gains, strict=True)]
    np.testing.assert_allclose(gram_schmidt(*pair)[0], expected, rtol=1e-10)
    assert np.mean(gains) == pytest.approx(1)  # so the mean of the bands becomes the matched PAN
    np.testing.assert_allclose(gram_schmidt(*pair)[0].mean(0), matched(pan[0], intensity), rtol=1e-10)


def test_mtf_glp_adds_only_what_the_revisits_cannot_show(pair: tuple[Tensor, Tensor]) -> None:
    bands, pan = pair
    sharp = mtf_glp(bands, pan, (20, 20))
    assert (sharp - bands).abs().max() > 0.01
    # Of a PAN that the coarse grid holds wholly, nothing is left to add.
    assert (mtf_glp(bands, torch.full_like(pan, 0.4), (20, 20)) - bands).abs().max() < 1e-9


def test_sharpened_images_are_nearer_to_the_truth_than_the_enlarged_median() -> None:
    truth = scene(3, 120) * (1 + 0.2 * scene(1, 120, 3))
    detail = torch.rand(1, 1, 120, 120, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = truth * (0.8 + 0.4 * detail)
    revisits = degrade(truth, (30, 30)).unsqueeze(1).expand(-1, 2, -1, -1, -1)
    batch = make_batch(revisits, truth.mean(1, keepdim=True), truth)
    images = baselines(batch)
    errors = {name: (image - truth).square().mean().item() for name, image in images.items()}
    assert all(errors[name] < 0.7 * errors["bicubic_median"] for name in PANSHARPENED), errors


def test_black_inputs_stay_finite() -> None:
    black = torch.zeros(1, 3, 40, 40)
    for image in (
        brovey(black, black[:, :1]),
        gram_schmidt(black, black[:, :1]),
        mtf_glp(black, black[:, :1], (10, 10)),
    ):
        assert torch.equal(image, black)
