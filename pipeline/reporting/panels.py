"""Panels of a chip: clearest revisit, PAN, fused image, HR and error; below them each revisit and its influence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.config import OutputConfig
from pipeline.data.batches import Batch
from sharding.picture import robust_high, sheet, to_rgb8

ERROR_FULL_SCALE = 0.1
"""Absolute error, in reflectance, that is drawn white."""


def num_panels(config: OutputConfig, step: int, steps_per_epoch: int, total_steps: int) -> int:
    """Return the number of chips to draw at the validation after a step.

    With ``panels_every`` 0 these are the validations that show how a training changes: after epochs 1, 2, 4, 8 and so
    on, and after the last step.
    """
    epoch = -(-step // steps_per_epoch)
    draws = epoch % config.panels_every == 0 if config.panels_every else epoch & (epoch - 1) == 0
    return config.panels if draws or step == total_steps else 0


def panel(
    batch: Batch, fused: Tensor, shares: Sequence[float], title: str, rgb: Sequence[int]
) -> npt.NDArray[np.uint8]:
    """Draw the first chip of ``batch`` and its ``fused`` image [B, C, H, W] as one picture [h, w, 3].

    From the left: the revisit under ``title``, PAN, fused, HR, absolute error. Below: each revisit under its number and
    its influence on the fused image (`pipeline.quality.influence`), in percent.

    Revisits, fused and HR share one contrast stretch, so that their radiometry can be compared by eye. ``rgb`` are
    the positions of the bands that are drawn.
    """
    bands = list(rgb)
    hr = batch.hr[0, bands].cpu().numpy()
    high = robust_high(hr)
    revisits = [to_rgb8(image, high=high) for image in batch.lr[0, :, bands].cpu().numpy()]
    pan = batch.pan[0].cpu().numpy()
    result = fused[0, bands].float().cpu().numpy()
    tiles = [
        (title, revisits[int(batch.revisit[0])]),
        ("PAN", to_rgb8(pan)),
        ("fused", to_rgb8(result, high=high)),
        ("HR", to_rgb8(hr, high=high)),
        ("|error|", to_rgb8(np.abs(result - hr), high=ERROR_FULL_SCALE)),
    ]
    below = [
        (f"{number}: {share:.0%}", image) for number, (share, image) in enumerate(zip(shares, revisits, strict=True))
    ]
    return np.asarray(sheet([tiles, below], tile_size=hr.shape[-1]), dtype=np.uint8)
