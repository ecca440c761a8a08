"""Quality of fused images without a target: spectral and spatial distortion, HQNR, and offsets to the inputs.

HQNR (Aiazzi et al., "Full-scale assessment of pansharpening methods and data products", SPIE 9244, 2014) joins the
spectral distortion of Khan et al. (IEEE TGRS 47(11), 2009) with the spatial one of QNR (Alparone et al., PE&RS 74(2),
2008). It has only the inputs of the fusion: where they show other land or other days, it says so of every method.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.quality.degradation import degrade
from sharding.prepare.shifts import shift_between

MEASURES = ("d_lambda", "d_s", "hqnr", "pan_offset", "lr_offset")
"""Names of the measures: distortions and HQNR 0 to 1, lengths of offsets in high-resolution pixels."""

BLOCK = 32
"""Side of a block of the quality indexes, about; pixels of the grid that is compared."""
FARTHEST = 4.0
"""Largest offset, pixels of the compared grid: a farther peak of the correlation is one by chance."""
TINY = 1e-14
"""Squared reflectance below which a block is flat, or black."""


@torch.no_grad()
def no_reference(fused: Tensor, lr: Tensor, pan: Tensor) -> dict[str, Tensor]:
    """Measure fused images against the low-resolution image and PAN that they were made of.

    Args:
        fused: Fused images [B, C, H, W], reflectance.
        lr: Low-resolution images [B, C, h, w]: for several revisits their median.
        pan: Panchromatic images [B, 1, H, W].

    Returns:
        A tensor [B], float64, for each name of ``MEASURES``; an offset is NaN where nothing
        correlates within FARTHEST.
    """
    fused, lr, pan = fused.double(), lr.double(), pan.double()
    size = (lr.shape[-2], lr.shape[-1])
    seen = degrade(fused, size)
    spectral = (1 - hypercomplex_quality(seen, lr, _blocks(lr))).clamp(0, 1)
    blocks = _blocks(pan)
    change = quality(fused, pan.expand_as(fused), blocks) - quality(lr, degrade(pan, size).expand_as(lr), blocks)
    spatial = change.abs().mean(dim=1).clamp(0, 1)
    ratio = fused.shape[-1] / lr.shape[-1]
    return {
        "d_lambda": spectral,
        "d_s": spatial,
        "hqnr": (1 - spectral) * (1 - spatial),
        "pan_offset": _offset(fused, pan),
        "lr_offset": ratio * _offset(seen, lr),
    }


def quality(a: Tensor, b: Tensor, blocks: tuple[int, int]) -> Tensor:
    """Return the universal quality index of each band (Wang and Bovik, IEEE SPL 9(3), 2002), -1 to 1.

    Args:
        a: Images [B, C, H, W].
        b: Images of the same shape.
        blocks: Numbers of blocks along rows and columns, whose indexes are averaged.

    Returns:
        [B, C].
    """
    a, b = _cut(a, blocks), _cut(b, blocks)
    mean_a, mean_b = a.mean(-1), b.mean(-1)
    covariance = (a * b).mean(-1) - mean_a * mean_b
    variances = a.var(-1, correction=0) + b.var(-1, correction=0)
    squares = mean_a**2 + mean_b**2
    # A flat pair has no structure to differ in: its means alone count, as in the limit of small equal variances.
    structure = torch.where(variances > TINY, 2 * covariance / variances.clamp(min=TINY), 1.0)
    luminance = torch.where(squares > TINY, 2 * mean_a * mean_b / squares.clamp(min=TINY), 1.0)
    return (structure * luminance).mean(-1)


def hypercomplex_quality(a: Tensor, b: Tensor, blocks: tuple[int, int]) -> Tensor:
    """Return the quality index of all bands together (Garzelli and Nencini, Q2n, IEEE GRSL 6(4), 2009), 0 to 1.

    A spectrum is a hypercomplex number of 2, 4, 8 ... parts, missing bands are 0. Unlike the mean over bands of
    :func:`quality` it sees a change of the spectrum's direction.

    Args:
        a: Images [B, C, H, W].
        b: Images of the same shape.
        blocks: Numbers of blocks along rows and columns, whose indexes are averaged.

    Returns:
        [B].
    """
    a, b = (_padded(_cut(image, blocks)) for image in (a, b))
    mean_a, mean_b = a.mean(-1, keepdim=True), b.mean(-1, keepdim=True)
    covariance = _product(a - mean_a, _conjugate(b - mean_b)).mean(-1).norm(dim=1)
    variances = ((a - mean_a) ** 2 + (b - mean_b) ** 2).sum(1).mean(-1)
    product = (mean_a.norm(dim=1) * mean_b.norm(dim=1)).squeeze(-1)
    squares = (mean_a**2 + mean_b**2).sum(1).squeeze(-1)
    structure = torch.where(variances > TINY, 2 * covariance / variances.clamp(min=TINY), 1.0)
    luminance = torch.where(squares > TINY, 2 * product / squares.clamp(min=TINY), 1.0)
    index: Tensor = (structure * luminance).mean(-1)
    return index


def _blocks(image: Tensor) -> tuple[int, int]:
    rows, columns = (max(1, round(side / BLOCK)) for side in image.shape[-2:])
    return rows, columns


def _cut(image: Tensor, blocks: tuple[int, int]) -> Tensor:
    """Cut [B, C, H, W] into equal blocks [B, C, blocks, pixels]; the rows and columns that remain are left out."""
    rows, columns = blocks
    height, width = image.shape[-2] // rows, image.shape[-1] // columns
    whole = image[..., : rows * height, : columns * width]
    return whole.reshape(*image.shape[:2], rows, height, columns, width).transpose(3, 4).flatten(4).flatten(2, 3)


def _padded(spectra: Tensor) -> Tensor:
    """Add black bands to [B, C, ...] until their number is a power of 2."""
    parts = 1 << (spectra.shape[1] - 1).bit_length()
    black = spectra.new_zeros(spectra.shape[0], parts - spectra.shape[1], *spectra.shape[2:])
    return torch.cat([spectra, black], dim=1)


def _conjugate(number: Tensor) -> Tensor:
    return torch.cat([number[:, :1], -number[:, 1:]], dim=1)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Multiply hypercomplex numbers [B, parts, ...] by the construction of Cayley and Dickson."""
    if x.shape[1] == 1:
        return x * y
    (a, b), (c, d) = x.chunk(2, dim=1), y.chunk(2, dim=1)
    left = _product(a, c) - _product(_conjugate(d), b)
    right = _product(d, a) + _product(b, _conjugate(c))
    return torch.cat([left, right], dim=1)


def _offset(image: Tensor, other: Tensor) -> Tensor:
    """Return the length [B] of the shift between the means over bands, pixels; NaN where nothing correlates."""
    lengths = []
    for a, b in zip(image.mean(1).cpu().numpy(), other.mean(1).cpu().numpy(), strict=True):
        shift = shift_between(a, b)
        length = np.inf if shift is None else np.hypot(*shift)
        lengths.append(length if length <= FARTHEST else np.nan)
    return torch.tensor(lengths, dtype=torch.float64)
