"""Consistency of a fused image with its revisits: both on the low-resolution grid, where revisits show colours."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quality.degradation import degrade
from pipeline.quality.masks import mean_over, registered_mask
from pipeline.quality.registration import register

WHOLE = 1 - 1e-4
"""Share of a low-resolution pixel, as the sensor weighs it, that must hold data."""


def consistency_error(fused: Tensor, lr: Tensor, valid: Tensor | None, preference: float) -> Tensor:
    """Return the mean absolute error [B] of degraded fused images to the median of their revisits.

    The median is registered to the degraded image by whole and half low-resolution pixels: revisits lie up to a pixel
    beside the target, and that is no error of colour.

    Args:
        fused: Fused images [B, C, H, W], reflectance.
        lr: Revisits [B, R, C, h, w], reflectance.
        valid: Mask [B, 1, H, W] of the high-resolution pixels with data, 1 or 0; None takes all.
        preference: As in :func:`pipeline.quality.registration.register`.

    Raises:
        UserError: The revisits are smaller than 11 px.
    """
    median, seen = revisits_median(lr)
    size = (median.shape[-2], median.shape[-1])
    if valid is not None:
        seen = seen * (degrade(valid, size) > WHOLE)
    mask = registered_mask(seen)
    pair = register(degrade(fused, size), median, "centred", preference, mask)
    return mean_over((pair.prediction - pair.target).abs(), mask)


def revisits_median(lr: Tensor) -> tuple[Tensor, Tensor]:
    """Return the per-pixel median [B, C, h, w] of the revisits that hold data, and the mask [B, 1, h, w] of any.

    A pixel holds no data if all its bands are 0. Of an even number the median is the mean of the middle two. It is
    robust to clouds in fewer than half of the revisits; ``data.cloudy`` leaves out cloudy ones before.

    Args:
        lr: Revisits [B, R, C, h, w].
    """
    shows = (lr != 0).any(dim=2, keepdim=True)
    ordered = torch.where(shows, lr, torch.inf).sort(dim=1).values
    count = shows.sum(dim=1, keepdim=True)
    lower, upper = ((count - 1).clamp(min=0) // 2, count // 2)
    middle = [ordered.gather(1, place.expand_as(ordered[:, :1])) for place in (lower, upper.clamp(max=lr.shape[1] - 1))]
    seen = (count > 0).to(lr.dtype).squeeze(1)
    median = torch.where(count > 0, (middle[0] + middle[1]) / 2, 0.0).squeeze(1)
    return median, seen
