"""Functions shared by losses and metrics: SSIM maps, spectral angles, and the precision that both need."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quality.constants import constant

SSIM_SIGMA = 1.5
"""Width of SSIM's Gaussian, pixels."""

C1 = 0.01**2
C2 = 0.03**2
"""SSIM's constants for images in [0, 1]."""

DARK = 1e-3
"""Length of a spectrum, reflectance, below which its direction is noise."""


def widen(image: Tensor) -> Tensor:
    """Return ``image`` in float32 if it is half or bfloat16: 8 bits cannot resolve mean squares of 1e-4."""
    return image.float() if image.dtype in (torch.float16, torch.bfloat16) else image


def ssim_map(a: Tensor, b: Tensor, taps: int, *, mirror: bool, epsilon: float = 0.0) -> Tensor:
    """Return the structural similarity of every pixel and band (Wang et al., IEEE TIP 2004, equation 13).

    Args:
        a: Images [B, C, H, W] in [0, 1].
        b: Images of the same shape.
        taps: Width of the Gaussian window, odd, pixels.
        mirror: True mirrors the border; False pads it with zeros.
        epsilon: Added to the denominator.

    Returns:
        The map [B, C, H, W].
    """
    rows = _gaussian_matrix(a, a.shape[-2], taps, mirror)
    columns = _gaussian_matrix(a, a.shape[-1], taps, mirror).T
    moments = rows @ torch.stack([a, b, a * a, b * b, a * b]) @ columns
    mean_a, mean_b, aa, bb, ab = moments.unbind()
    variances = aa - mean_a**2 + bb - mean_b**2
    covariance = ab - mean_a * mean_b
    numerator = (2 * mean_a * mean_b + C1) * (2 * covariance + C2)
    similarity: Tensor = numerator / ((mean_a**2 + mean_b**2 + C1) * (variances + C2) + epsilon)
    return similarity


def spectral_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine [B, H, W] of the angle between the spectra of [B, C, H, W]; 0 if one is black."""
    norms: Tensor = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return ((a * b).sum(dim=1) / (norms + 1e-8)).clamp(-1, 1)


def spectral_chord(a: Tensor, b: Tensor) -> Tensor:
    """Return 2 sin(angle / 2) [B, H, W] of the angle between the spectra of [B, C, H, W]: small angles in radians.

    Its slope is finite everywhere: a spectrum shorter than ``DARK`` counts as one of that length.
    """
    a, b = (image / torch.linalg.vector_norm(image, dim=1, keepdim=True).clamp(min=DARK) for image in (a, b))
    chord: Tensor = torch.linalg.vector_norm(a - b, dim=1)
    return chord


@constant
def _gaussian_matrix(device: torch.device, size: int, taps: int, mirror: bool) -> Tensor:
    """Return the [size, size] matrix that averages along an axis, border rule included (float64).

    A product with it is differentiated by a product, where depthwise convolutions of one channel are slow.
    """
    half = taps // 2
    offsets = torch.arange(-half, half + 1, device=device)
    kernel = torch.exp(-0.5 * (offsets.double() / SSIM_SIGMA) ** 2)
    kernel = kernel / kernel.sum()
    source = torch.arange(size, device=device).unsqueeze(1) + offsets
    inside = (source >= 0) & (source < size)
    if mirror:
        source = (size - 1) - ((size - 1) - source.abs()).abs()
        inside = torch.ones_like(inside)
    weights = torch.where(inside, kernel.expand_as(source), 0.0)
    matrix = torch.zeros(size, size, dtype=torch.float64, device=device)
    return matrix.scatter_add(1, source.clamp(0, size - 1), weights)
