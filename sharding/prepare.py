"""One scene to the arrays of a sample: the training grid, integers, and the clearest revisit. All pure."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from sharding.schema import STEP
from sharding.worldstrat import SPOT_SCALE, Scene

LR_SIZE = 160
HR_SIZE = 500
# Scene classes that say nothing of the ground: no data, saturated, cloud shadow, clouds, cirrus. Snow (11) stays:
# it is seen, and the comparison with the other revisits tells whether it is usual there.
SCL_MASKED = (0, 1, 3, 8, 9, 10)

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Prepared:
    """A scene on the training grid."""

    lr: Array
    """[R, C, 160, 160] reflectance."""

    clm: NDArray[np.uint8]
    """[R, 1, 160, 160] cloud masks."""

    hr: Array
    """[3, 500, 500] reflectance in [0, 1]."""

    pan: Array
    """[1, 500, 500] reflectance in [0, 1]."""

    clearest: int
    """0-based index of the clearest revisit."""


def prepare(scene: Scene) -> Prepared:
    """Bring a scene to the training grid: images by antialiased bilinear resizing, masks by the nearest pixel.

    Sentinel-2 reflectance is kept as it is, SPOT counts are divided by 10000, resized and clamped to [0, 1], as
    the published pipeline does.
    """
    lr = _resized(scene.lr, LR_SIZE)
    clm = _nearest(scene.clm)
    usable = (clm == 0) & (_nearest(scene.valid) > 0)
    for revisit, scl in zip(usable, scene.scl, strict=True):
        if scl is not None:
            revisit &= ~np.isin(_nearest(scl[None])[0], SCL_MASKED)
    return Prepared(
        lr=lr,
        clm=clm,
        hr=_spot(scene.hr),
        pan=_spot(scene.pan),
        clearest=clearest_revisit(lr, usable),
    )


def clearest_revisit(lr: Array, usable: NDArray[np.bool_]) -> int:
    """Return the revisit that is most like what the revisits show together.

    It has the least median absolute difference to the per-pixel median of the revisits, over usable pixels;
    the lower number wins a tie. Cloud cover alone would choose a cloudless, snow-covered revisit.

    Args:
        lr: [R, C, h, w].
        usable: [R, 1, h, w] pixels with data, free of clouds and their shadows.

    Returns:
        0-based index; 0 where no revisit has a usable pixel.
    """
    seen = np.where(usable, lr, np.nan)
    with warnings.catch_warnings():
        # Pixels that no revisit shows, and revisits without a usable pixel, are NaN and never the least.
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        median = np.nanmedian(seen, axis=0)
        difference = np.nanmedian(np.abs(seen - median).reshape(len(lr), -1), axis=1)
    return int(np.argmin(np.where(np.isnan(difference), np.inf, difference)))


def quantise(image: Array) -> tuple[NDArray[np.uint16], int]:
    """Round reflectance to integers of ``STEP``.

    Returns:
        The integers, and how many values lay above the largest and were cut to it. Negative values become 0.
    """
    steps = np.round(image.astype(np.float64) / STEP)
    limit = np.iinfo(np.uint16).max
    return np.clip(steps, 0, limit).astype(np.uint16), int((steps > limit).sum())


def _spot(image: NDArray[np.uint16]) -> Array:
    reflectance = image.astype(np.float32) / np.float32(SPOT_SCALE)
    return np.asarray(np.clip(_resized(reflectance[None], HR_SIZE)[0], 0, 1), dtype=np.float32)


def _resized(image: Array, size: int) -> Array:
    resized = functional.interpolate(torch.from_numpy(image), (size, size), mode="bilinear", antialias=True)
    return np.asarray(resized.numpy(), dtype=np.float32)


def _nearest(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    resized = functional.interpolate(torch.from_numpy(mask), (LR_SIZE, LR_SIZE), mode="nearest")
    return np.asarray(resized.numpy(), dtype=np.uint8)
