"""Measures of opensr-test: consistency with the input, and what an image improves, omits and invents.

Aybar et al., "A Comprehensive Benchmark for Optical Remote Sensing Image Super-Resolution", IEEE GRSL 21, 2024, with
the settings of the package's version 1.3.3, pixel by pixel: L1 and spectral angle for the consistency, normalised
difference for the correctness, histograms matched to the target. Images are not aligned here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

MEASURES = ("reflectance", "spectral", "improvement", "omission", "hallucination")
"""Names of the measures: reflectance, degrees, and three shares of sum 1. The package's spatial one is `lr_offset`."""

BORDER = 16
"""Pixels of the high-resolution image at each border that are left out, about: whole low-resolution pixels."""
QUANTILE = 0.75
"""Share of the pixels that do not count in the correctness where all three distances are below this quantile."""
LAMBDA = 0.05
"""Weight of the curvature of the three spaces."""
TEMPERATURE = 0.25
"""Temperature of the softmin over the three spaces."""
TINY = 1e-8


@torch.no_grad()
def opensr_measures(fused: Tensor, lr: Tensor, target: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
    """Measure fused images by what they change of the low-resolution image, and whether the target has it.

    Args:
        fused: Fused images [B, C, H, W], reflectance.
        lr: Low-resolution images [B, C, h, w]: for several revisits their median.
        target: High-resolution images [B, C, H, W].
        valid: Mask [B, 1, H, W], 1 where there is data, else 0; None if there is everywhere.

    Returns:
        A tensor [B], float64, for each name of ``MEASURES``; NaN for images that are all border or without data.
    """
    masks = torch.ones_like(target[:, :1]) if valid is None else valid
    each = [
        _measure(*images) for images in zip(fused.double(), lr.double(), target.double(), masks.double(), strict=True)
    ]
    return {name: torch.tensor([found[place] for found in each]) for place, name in enumerate(MEASURES)}


def _measure(fused: Tensor, lr: Tensor, target: Tensor, valid: Tensor) -> list[float]:
    """Return the MEASURES of one image."""
    ratio = target.shape[-1] / lr.shape[-1]
    border = int(BORDER / ratio)
    lr = _inner(lr, border)
    fused, target, valid = (_inner(image, round(border * ratio)) for image in (fused, target, valid))
    held = valid[0] == 1
    if not lr.numel() or not held.any():
        return [float("nan")] * len(MEASURES)
    seen = _resized(fused, lr)
    enlarged = _resized(lr, target)
    target, enlarged = target[:, held], enlarged[:, held]
    matched = torch.stack([_matched(band, wanted) for band, wanted in zip(fused[:, held], target, strict=True)])
    whole = _resized(valid, lr)[0] > 1 - TINY
    lr, seen = lr[:, whole], seen[:, whole]
    cosine = (lr * seen).sum(0) / (lr.norm(dim=0) * seen.norm(dim=0))
    consistency = [(lr - seen).abs().mean(), cosine.clamp(-1, 1).acos().rad2deg().nanmean()]
    shares = _correctness(_distance(enlarged, target), _distance(matched, target), _distance(matched, enlarged))
    return [value.item() for value in (*consistency, *shares)]


def _correctness(reference: Tensor, improvement: Tensor, omission: Tensor) -> list[Tensor]:
    """Return the shares of improvement, omission and hallucination, from distances [pixels].

    The distances are those of the enlarged input to the target, of the image to the target, and of the image to the
    enlarged input.
    """
    threshold = reference.flatten().kthvalue(max(1, int(QUANTILE * reference.numel()))).values
    counts = (reference > threshold) | (improvement > threshold) | (omission > threshold)
    to_target, to_input = ((distance / reference)[counts] for distance in (improvement, omission))
    curve = 1 - torch.exp(-LAMBDA * (to_target + to_input - 1))
    spaces = [to_target + to_input * curve, to_input + to_target * curve, torch.exp(-LAMBDA * to_target * to_input)]
    shares = torch.softmax(-torch.stack(spaces) / TEMPERATURE, dim=0)
    return [share.nanmean() for share in shares]


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the normalised difference [pixels], the mean over bands."""
    return ((a - b).abs() / (a + b + TINY).abs()).nanmean(dim=0)


def _matched(band: Tensor, wanted: Tensor) -> Tensor:
    """Return a band [pixels] with the distribution of values of another: each value becomes that of its quantile."""
    _, place, count = np.unique(band.cpu().numpy(), return_inverse=True, return_counts=True)
    values, others = np.unique(wanted.cpu().numpy(), return_counts=True)
    own, other = (np.cumsum(numbers) / numbers.sum() for numbers in (count, others))
    found = np.asarray(np.interp(own, other, values))[place].reshape(band.shape)
    return torch.from_numpy(found).to(band)


def _resized(image: Tensor, like: Tensor) -> Tensor:
    size = (like.shape[-2], like.shape[-1])
    return functional.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def _inner(image: Tensor, border: int) -> Tensor:
    height, width = image.shape[-2:]
    return image[:, border : max(border, height - border), border : max(border, width - border)]
