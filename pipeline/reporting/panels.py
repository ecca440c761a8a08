"""Image panels of a chip: clearest revisit, PAN, fused image, HR and error, side by side."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.data.batches import Batch
from sharding.picture import robust_high, sheet, to_rgb8

ERROR_FULL_SCALE = 0.1
"""Absolute error, in reflectance, that is drawn white."""


def panel(batch: Batch, fused: Tensor, title: str) -> npt.NDArray[np.uint8]:
    """Draw the first chip of ``batch`` and its ``fused`` image [B, C, H, W] as one picture [h, w, 3].

    From the left: the revisit under ``title``, PAN, fused, HR, absolute error.

    Revisit, fused and HR share one contrast stretch, so that their radiometry can be compared by eye. With more than
    three bands the first three are drawn.
    """
    hr = batch.hr[0, :3].cpu().numpy()
    high = robust_high(hr)
    revisit = batch.lr[0, int(batch.revisit[0]), :3].cpu().numpy()
    pan = batch.pan[0].cpu().numpy()
    result = fused[0, :3].float().cpu().numpy()
    tiles = [
        (title, to_rgb8(revisit, high=high)),
        ("PAN", to_rgb8(pan)),
        ("fused", to_rgb8(result, high=high)),
        ("HR", to_rgb8(hr, high=high)),
        ("|error|", to_rgb8(np.abs(result - hr), high=ERROR_FULL_SCALE)),
    ]
    return np.asarray(sheet([tiles], tile_size=hr.shape[-1]), dtype=np.uint8)
