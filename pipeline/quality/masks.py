"""Masks of pixels with data: what loss and metrics compare, and means over it.

Registration moves the target by interpolating it, so a pixel counts only if all pixels that a shift may read hold data;
a window of SSIM counts only if all its pixels count. So no pixel without data has a part in any value.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from pipeline.quality.registration import HALF_WIDTH

WIDEST_WINDOW = 11
"""Side of the largest SSIM window, that of the metric, pixels."""


def registered_mask(valid: Tensor) -> Tensor:
    """Return the mask [B, 1, H - 10, W - 10] of the registered pixels that no shift mixes with one without data.

    Args:
        valid: Mask [B, 1, H, W], 1 where there is data, else 0.
    """
    return _eroded(valid, 2 * HALF_WIDTH + 1, 0)


def window_mask(mask: Tensor, taps: int) -> Tensor:
    """Return the mask [B, 1, H, W] of pixels whose window, ``taps`` pixels a side, is whole within the image."""
    return _eroded(mask, taps, taps // 2)


def has_data(valid: Tensor) -> Tensor:
    """Return [B], 1 for a chip that can be compared: with a square of 21 pixels with data, or its part of the image.

    Then registration and both SSIM windows have a pixel. Other chips get 0, and count nowhere.
    """
    if min(valid.shape[-2:]) <= 2 * HALF_WIDTH:  # too small to register, which is refused there
        return valid.amax(dim=(1, 2, 3))
    return window_mask(registered_mask(valid), WIDEST_WINDOW).amax(dim=(1, 2, 3))


def mean_over(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean [B] of [B, C, H, W] over the pixels of a mask [B, 1, H, W]; None takes all."""
    if mask is None:
        return values.mean(dim=(1, 2, 3))
    return band_means(values, mask).mean(dim=(1, 2, 3))


def band_means(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the means [B, C, 1, 1] of [B, C, H, W] over the pixels of a mask; 0 without any pixel."""
    if mask is None:
        return values.mean(dim=(-2, -1), keepdim=True)
    count = mask.sum(dim=(-2, -1), keepdim=True).clamp(min=1)
    return (values * mask).sum(dim=(-2, -1), keepdim=True) / count


def _eroded(mask: Tensor, side: int, padding: int) -> Tensor:
    return 1 - functional.max_pool2d(1 - mask, side, stride=1, padding=padding)
