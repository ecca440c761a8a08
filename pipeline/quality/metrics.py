"""Image quality of each sample, as predicted and after bias adjustment."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quality.losses import bias_adjust
from pipeline.quality.masks import WIDEST_WINDOW, band_means, mean_over, registered_mask, window_mask
from pipeline.quality.names import ADJUSTED
from pipeline.quality.registration import Mode, register
from pipeline.quality.similarity import spectral_cosine, ssim_map, widen

SSIM_TAPS = WIDEST_WINDOW
RESOLUTION_RATIO = 1 / 4
"""ERGAS's ratio of pixel sizes, high resolution to low, as published for WorldStrat (its grids have 0.32)."""


@torch.no_grad()
def image_metrics(
    prediction: Tensor,
    target: Tensor,
    registration: Mode = "centred",
    ratio: float = RESOLUTION_RATIO,
    valid: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compare fused images with the target.

    Each set of metrics registers the images again: removing a bias may change the best shift. Averages over samples are
    means of these values; for PSNR too, so not the PSNR of the mean error.

    Args:
        prediction: Fused images [B, C, H, W], reflectance.
        target: High-resolution images of the same shape.
        registration: As in :func:`pipeline.quality.registration.register`.
        ratio: Size of a high-resolution pixel in low-resolution ones, for ERGAS.
        valid: Mask [B, 1, H, W] of pixels with data, 1 or 0; the others have no part in any value. None takes all.

    Returns:
        A tensor [B] for each name of ``METRICS``, and for each with the suffix ``_adjusted``. PSNR is
        infinite for equal images.

    Raises:
        UserError: If the images are smaller than 11 px, or the registration is unknown.
        ValueError: If the shapes differ.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = widen(prediction), widen(target)
        raw = _compare(prediction, target, registration, ratio, valid)
        adjusted = _compare(bias_adjust(prediction, target, valid), target, registration, ratio, valid)
    return raw | {name + ADJUSTED: value for name, value in adjusted.items()}


def _compare(
    prediction: Tensor, target: Tensor, registration: Mode, ratio: float, valid: Tensor | None
) -> dict[str, Tensor]:
    mask = None if valid is None else registered_mask(valid)
    pair = register(prediction, target, registration, mask=mask)
    difference = pair.prediction - pair.target
    mse = mean_over(difference.square(), mask)
    angle = spectral_cosine(pair.prediction, pair.target).acos().rad2deg()
    similarity = ssim_map(pair.prediction, pair.target, SSIM_TAPS, mirror=False)
    return {
        "mse": mse,
        "mae": mean_over(difference.abs(), mask),
        "psnr": -10 * mse.log10(),
        "ssim": mean_over(similarity, None if mask is None else window_mask(mask, SSIM_TAPS)),
        "sam": mean_over(angle.unsqueeze(1), mask),
        "ergas": _ergas(difference, pair.target, ratio, mask),
    }


def _ergas(difference: Tensor, target: Tensor, ratio: float, mask: Tensor | None) -> Tensor:
    """Return the relative error over bands (Wald, "Quality of high resolution synthesised images", 2000), percent."""
    error, mean = band_means(difference.square(), mask), band_means(target, mask)
    relative = error.flatten(1) / (mean.flatten(1).square() + 1e-8)
    return 100 * ratio * relative.mean(dim=1).sqrt()
