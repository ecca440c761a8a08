"""Degradation of an image to a coarser grid, as an optical sensor of larger pixels would see it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.quality.constants import constant

GAIN = 0.3
"""Gain of the sensor's modulation transfer function at the Nyquist frequency of the coarser grid.

Multispectral instruments are built for about 0.2 to 0.35 (Aiazzi et al., PE&RS 72(5), 2006).
"""
REACH = 3
"""Half-width of the Gaussian, standard deviations."""


def degrade(image: Tensor, size: tuple[int, int], gain: float = GAIN) -> Tensor:
    """Filter an image by a Gaussian transfer function and sample it on a coarser grid of the same land.

    Any ratio of the grids is possible: each coarse pixel is a weighted mean around its centre. At the border the
    weights that lie outside the image are left out, so a flat image stays flat.

    Args:
        image: Images [..., H, W].
        size: Rows and columns (h, w) of the result.
        gain: Gain at the coarse grid's Nyquist frequency, above 0 and below 1.

    Returns:
        [..., h, w], of the image's type.
    """
    rows, columns = (_weights(image, fine, coarse, gain) for fine, coarse in zip(image.shape[-2:], size, strict=True))
    return rows @ image @ columns.T


@constant
def _weights(device: torch.device, fine: int, coarse: int, gain: float) -> Tensor:
    """Return the weights [coarse, fine] of an axis (float64)."""
    ratio = fine / coarse
    # The transform of a Gaussian of width s is exp(-2 (pi s f)^2), and the Nyquist frequency is 1 / (2 ratio).
    width = ratio * math.sqrt(-2 * math.log(gain)) / math.pi
    centre = (torch.arange(coarse, dtype=torch.float64, device=device) + 0.5) * ratio - 0.5
    distance = torch.arange(fine, dtype=torch.float64, device=device) - centre.unsqueeze(1)
    weights = torch.exp(-0.5 * (distance / width) ** 2) * (distance.abs() <= max(REACH * width, 0.5))
    return weights / weights.sum(dim=1, keepdim=True)
