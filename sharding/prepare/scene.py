"""Arrays of a sample from one scene: choice of revisits, resizing to the training grid, integers. All pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from sharding.prepare.options import STEP, SampleOptions
from sharding.sources.worldstrat.rasters import Scene

SPOT_SCALE = 10_000
# Scene classes that do not show the ground: no data, saturated, cloud shadow, clouds, cirrus. Snow (11) is not masked:
# it is visible, and the comparison with the other revisits shows if it is usual there.
SCL_MASKED = (0, 1, 3, 8, 9, 10)

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Chosen:
    """Chosen revisits of a sample."""

    revisits: tuple[int, ...]
    """0-based indices into the scene's revisits, ascending."""

    clearest: int
    """0-based index of the clearest one in ``revisits``."""


@dataclass(frozen=True)
class Prepared:
    """Scene on the grids of its sample."""

    lr: Array
    """[R, C, h, w] reflectance."""

    clm: NDArray[np.uint8]
    """[R, 1, h, w] cloud masks."""

    hr: Array
    """[3, H, W] reflectance in [0, 1]."""

    pan: Array
    """[1, H, W] reflectance in [0, 1]."""


def choose_revisits(scene: Scene, options: SampleOptions) -> Chosen:
    """Choose a sample's revisits by the red, green and blue bands of all revisits of the scene.

    Only these three bands count, so that the choice does not depend on the stored bands.
    """
    ranked = rank_revisits(scene.lr[:, options.rgb], _usable(scene))
    revisits = tuple(sorted(ranked[: options.revisits]) if options.select == "clearest" else range(options.revisits))
    return Chosen(revisits, revisits.index(ranked[0]))


def rank_revisits(lr: Array, usable: NDArray[np.bool_]) -> list[int]:
    """Return the revisits, the clearest first: a revisit is clearer if it is closer to the median of all.

    The measure is the median absolute difference to the per-pixel median of the revisits, over usable pixels; the
    lower number wins a tie. Cloud cover as the only measure would choose a cloudless, snow-covered revisit.

    Args:
        lr: Revisits [R, C, h, w].
        usable: Mask [R, 1, h, w] of pixels with data, without clouds and their shadows.

    Returns:
        0-based indices; revisits without a usable pixel come last.
    """
    median = _median(lr, usable)
    differences = [_median_difference(image, median, mask) for image, mask in zip(lr, usable, strict=True)]
    return [int(index) for index in np.argsort(differences, kind="stable")]


def prepare(scene: Scene, chosen: Sequence[int], options: SampleOptions) -> Prepared:
    """Resize a scene to the training grid: images antialiased and bilinear, masks by the nearest pixel.

    Sentinel-2 reflectance is not rescaled. SPOT counts are divided by 10000, resized and clamped to [0, 1], as in
    the published pipeline. Without sizes in the options nothing is resized.
    """
    lr, pan = prepare_inputs(scene, chosen, options)
    return Prepared(
        lr=lr,
        clm=_nearest(scene.clm[list(chosen)], options.lr_size),
        hr=_spot(scene.hr, options.hr_size),
        pan=pan,
    )


def prepare_inputs(scene: Scene, chosen: Sequence[int], options: SampleOptions) -> tuple[Array, Array]:
    """Return revisits [R, C, h, w] and PAN [1, H, W] as `prepare` does, without masks and target."""
    return _resized(scene.lr[list(chosen)], options.lr_size), _spot(scene.pan, options.hr_size)


def quantise(image: Array) -> tuple[NDArray[np.uint16], int]:
    """Round reflectance to integers of ``STEP``.

    Returns:
        The integers, and the number of values above the largest, which are clipped to it. Negative values become 0.
    """
    # In float32 the error of the largest values would exceed half a step.
    steps = np.divide(image, STEP, dtype=np.float64)
    np.rint(steps, out=steps)
    limit = np.iinfo(np.uint16).max
    saturated = int(np.count_nonzero(steps > limit))
    np.clip(steps, 0, limit, out=steps)
    return steps.astype(np.uint16), saturated


def _usable(scene: Scene) -> NDArray[np.bool_]:
    """Return the mask [R, 1, h, w] of pixels with data that neither CLM nor SCL, if present, masks as cloudy."""
    masked = np.isin(np.arange(256), SCL_MASKED)
    usable = scene.valid.copy()
    for mine, clm, scl, revisit in zip(usable, scene.clm, scene.scl, scene.revisits, strict=True):
        if revisit.has_clm:
            mine &= clm == 0
        if scl is not None:
            mine &= ~masked[scl]
    return usable


def _median(lr: Array, usable: NDArray[np.bool_]) -> Array:
    """Return the per-pixel median [C, h, w] of usable revisits; 0 where no revisit is usable.

    It is a sorting network of whole images: the few values of a pixel lie far apart in memory, and numpy's median
    with gaps takes twenty times as long.
    """
    ordered: Array = np.where(usable, lr, np.float32(np.inf))
    least = np.empty_like(ordered[0])
    for turn in range(len(ordered)):
        for left in range(turn % 2, len(ordered) - 1, 2):
            low, high = ordered[left], ordered[left + 1]
            np.minimum(low, high, out=least)
            np.maximum(low, high, out=high)
            low[:] = least
    count = usable.sum(axis=0)
    median: Array = np.zeros_like(least)
    for number in range(1, len(ordered) + 1):
        here = count == number
        if here.any():
            middle = (ordered[(number - 1) // 2] + ordered[number // 2]) / 2
            np.copyto(median, middle, where=here)
    return median


def _median_difference(image: Array, median: Array, usable: NDArray[np.bool_]) -> float:
    """Return the median of |image - median| over usable pixels of all bands; infinity if there is none."""
    count = len(image) * int(np.count_nonzero(usable))
    if count == 0:
        return np.inf
    values = np.where(usable, np.abs(image - median), np.float32(np.inf)).ravel()
    values.partition(count // 2)
    above = values[count // 2]
    below = values[: count // 2].max() if count % 2 == 0 else above
    return float((below + above) / 2)


def _spot(image: NDArray[np.uint16], size: int | None) -> Array:
    reflectance = image.astype(np.float32)
    reflectance /= np.float32(SPOT_SCALE)
    resized: Array = _resized(reflectance[None], size)[0]
    np.clip(resized, 0, 1, out=resized)
    return resized


def _resized(image: Array, size: int | None) -> Array:
    if size is None:
        return image
    resized = functional.interpolate(torch.from_numpy(image), (size, size), mode="bilinear", antialias=True)
    return np.asarray(resized.numpy(), dtype=np.float32)


def _nearest(mask: NDArray[np.uint8], size: int | None) -> NDArray[np.uint8]:
    if size is None:
        return mask
    resized = functional.interpolate(torch.from_numpy(mask), (size, size), mode="nearest")
    return np.asarray(resized.numpy(), dtype=np.uint8)
