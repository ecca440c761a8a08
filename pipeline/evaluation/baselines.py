"""Baselines without training: enlarged revisits, and classical pansharpening of their median."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.data.batches import Batch
from pipeline.quality.consistency import revisits_median
from pipeline.quality.degradation import degrade

BASELINES = ("bicubic_clearest", "bicubic_median")
"""Revisits alone, enlarged."""
PANSHARPENED = ("brovey", "gram_schmidt", "mtf_glp")
"""The enlarged median, sharpened by PAN."""

TINY = 1e-6
"""Least reflectance, or deviation of it, that is divided by."""


def median(batch: Batch) -> Tensor:
    """Return the per-pixel median [B, C, h, w] of the revisits, without those that hold no data there."""
    return revisits_median(batch.lr)[0]


def baselines(batch: Batch) -> dict[str, Tensor]:
    """Return the images [B, C, H, W] of BASELINES and PANSHARPENED, by method."""
    clearest = batch.lr[torch.arange(len(batch.chips), device=batch.lr.device), batch.revisit]
    middle = median(batch)
    size = (batch.pan.shape[-2], batch.pan.shape[-1])
    enlarged = _bicubic(middle, size)
    return {
        "bicubic_clearest": _bicubic(clearest, size),
        "bicubic_median": enlarged,
        "brovey": brovey(enlarged, batch.pan),
        "gram_schmidt": gram_schmidt(enlarged, batch.pan),
        "mtf_glp": mtf_glp(enlarged, batch.pan, (middle.shape[-2], middle.shape[-1])),
    }


def brovey(enlarged: Tensor, pan: Tensor) -> Tensor:
    """Multiply each band by the ratio of PAN to the mean of the bands.

    Gillespie, Kahle, Walker, "Color enhancement of highly correlated images II", Remote Sens. Environ. 22, 1987. PAN is
    first brought to the mean and deviation of the bands' mean, as both may have other units.

    Args:
        enlarged: Multispectral images [B, C, H, W] on the grid of PAN.
        pan: Panchromatic images [B, 1, H, W].

    Returns:
        [B, C, H, W].
    """
    intensity = enlarged.mean(dim=1, keepdim=True)
    return enlarged * _matched(pan, intensity) / intensity.clamp(min=TINY)


def gram_schmidt(enlarged: Tensor, pan: Tensor) -> Tensor:
    """Replace the first Gram-Schmidt component, the mean of the bands, by PAN.

    Laben and Brower, US patent 6,011,875, 2000, in the form of Aiazzi, Baronti, Selva, IEEE TGRS 45(10), 2007: each
    band gets the difference times its covariance with that component over the component's variance.

    Args:
        enlarged: Multispectral images [B, C, H, W] on the grid of PAN.
        pan: Panchromatic images [B, 1, H, W].

    Returns:
        [B, C, H, W].
    """
    intensity = enlarged.mean(dim=1, keepdim=True)
    centred = intensity - _mean(intensity)
    gain = _mean((enlarged - _mean(enlarged)) * centred) / _mean(centred**2).clamp(min=TINY**2)
    return enlarged + gain * (_matched(pan, intensity) - intensity)


def mtf_glp(enlarged: Tensor, pan: Tensor, size: tuple[int, int]) -> Tensor:
    """Add the details of PAN that the sensor of the revisits cannot resolve.

    Aiazzi, Alparone, Baronti, Garzelli, Selva, "MTF-tailored multiscale fusion of high-resolution MS and Pan imagery",
    PE&RS 72(5), 2006: details are PAN minus its low-pass image by the sensor's transfer function. Each band's PAN has
    the band's mean and deviation, as in Vivone et al., IEEE TGRS 53(5), 2015.

    Args:
        enlarged: Multispectral images [B, C, H, W] on the grid of PAN.
        pan: Panchromatic images [B, 1, H, W].
        size: Rows and columns (h, w) of a revisit.

    Returns:
        [B, C, H, W].
    """
    low = _bicubic(degrade(pan, size), (pan.shape[-2], pan.shape[-1]))
    return enlarged + (pan - low) * _deviation(enlarged) / _deviation(low).clamp(min=TINY)


def _bicubic(image: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(image, size=size, mode="bicubic", align_corners=False)


def _matched(pan: Tensor, intensity: Tensor) -> Tensor:
    """Return PAN with the mean and deviation of ``intensity``."""
    scale = _deviation(intensity) / _deviation(pan).clamp(min=TINY)
    return (pan - _mean(pan)) * scale + _mean(intensity)


def _mean(image: Tensor) -> Tensor:
    return image.mean(dim=(-2, -1), keepdim=True)


def _deviation(image: Tensor) -> Tensor:
    return image.std(dim=(-2, -1), keepdim=True, correction=0)
