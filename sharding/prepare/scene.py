"""Arrays of a sample from one scene: choice of revisits, resizing to the training grid, integers. All pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from sharding.errors import UnusableError
from sharding.prepare.median import median_of
from sharding.prepare.options import STEP, SampleOptions
from sharding.sources.source import Scene

# Scene classes that do not show the ground: no data, saturated, cloud shadow, clouds, cirrus. Snow (11) is not masked:
# it is visible, and the comparison with the other revisits shows if it is usual there.
SCL_MASKED = (0, 1, 3, 8, 9, 10)

_BLOCK = 1 << 15
"""Values that are rounded at a time, few enough for the processor's cache."""

HALF = np.float32(0.5)
"""Share of pixels with data that a resized pixel needs."""

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]


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
    """[C, H, W] reflectance."""

    pan: Array
    """[1, H, W] reflectance."""

    valid: NDArray[np.uint8] | None
    """[1, H, W] mask of the pixels whose target and PAN hold data: 1, else 0; None if the sample stores none."""


def choose_revisits(scene: Scene, options: SampleOptions) -> Chosen:
    """Choose a sample's revisits by the red, green and blue bands of all revisits of the scene.

    Only these three bands count, so that the choice does not depend on the stored bands.
    """
    ranked = rank_revisits(scene.lr[:, list(scene.rgb)], _usable(scene))
    order: Sequence[int] = range(len(ranked))
    if options.select == "clearest":
        order = ranked
    elif options.select == "nearest":
        order = _nearest_in_date(scene)
    # A source may let a scene with too few revisits through: they are then repeated.
    revisits = tuple(sorted(order[number % len(order)] for number in range(options.revisits)))
    return Chosen(revisits, min(range(len(revisits)), key=lambda place: ranked.index(revisits[place])))


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
    median = median_of(lr, usable)
    differences = [_median_difference(image, median, mask) for image, mask in zip(lr, usable, strict=True)]
    return [int(index) for index in np.argsort(differences, kind="stable")]


def prepare(scene: Scene, chosen: Sequence[int], options: SampleOptions) -> Prepared:
    """Resize a scene to the training grid: images antialiased and bilinear, masks by the nearest pixel.

    Target and PAN are then clamped to the scene's limit. Without sizes in the options nothing is resized.
    """
    lr, pan = prepare_inputs(scene, chosen, options)
    return Prepared(
        lr=lr,
        clm=_nearest(scene.clm[list(chosen)], options.lr_size),
        hr=_clamped(scene.hr, options.hr_size, scene.limit, scene.hr_valid if scene.masked else None),
        pan=pan,
        valid=_all_held((scene.hr_valid, scene.pan_valid), options.hr_size) if scene.keeps_valid else None,
    )


def prepare_inputs(scene: Scene, chosen: Sequence[int], options: SampleOptions) -> tuple[Array, Array]:
    """Return revisits [R, C, h, w] and PAN [1, H, W] as `prepare` does, without masks and target."""
    picked = list(chosen)
    valid, seen = (scene.valid[picked], scene.pan_valid) if scene.masked else (None, None)
    return (
        _resized(scene.lr[picked], options.lr_size, valid),
        _clamped(scene.pan, options.hr_size, scene.limit, seen),
    )


def quantise(image: Array) -> tuple[NDArray[np.uint16], int]:
    """Round reflectance to integers of ``STEP``.

    Returns:
        The integers, and the number of values above the largest, which are clipped to it. Negative values become 0.
    """
    limit, saturated = np.iinfo(np.uint16).max, 0
    stored = np.empty(image.shape, np.uint16)
    values, into = np.ascontiguousarray(image).reshape(-1), stored.reshape(-1)
    for start in range(0, values.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        # In float32 the error of the largest values would exceed half a step.
        steps = np.divide(values[part], STEP, dtype=np.float64)
        np.rint(steps, out=steps)
        if steps.max() > limit:
            saturated += int(np.count_nonzero(steps > limit))
        into[part] = np.clip(steps, 0, limit, out=steps)
    return stored, saturated


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


def _clamped(image: Array, size: int | None, limit: float | None, valid: Mask | None) -> Array:
    resized: Array = _resized(image[None], size, valid if valid is None else valid[None, None])[0]
    return resized if limit is None else np.clip(resized, 0, limit, out=resized)


def _nearest_in_date(scene: Scene) -> list[int]:
    """Return the revisits, the nearest in date to the target first; those without a date come last.

    Raises:
        UnusableError: If the target has no date.
    """
    taken = _day(scene.hr_date)
    if taken is None:
        raise UnusableError("no-date", "its target has no date, which --select nearest needs")
    days = [_day(revisit.date) for revisit in scene.revisits]
    distances = [abs(day - taken) if day is not None else math.inf for day in days]
    return sorted(range(len(days)), key=lambda index: (distances[index], index))


def _day(text: str | None) -> int | None:
    try:
        return date.fromisoformat((text or "")[:10]).toordinal()
    except ValueError:
        return None


def _resized(image: Array, size: int | None, valid: Mask | None = None) -> Array:
    """Resize images [N, C, h, w]; pixels outside a mask [N, 1, h, w] take no part, and become 0."""
    if size is None:
        return image
    if valid is not None and not valid.all():
        share = _resized(valid.astype(np.float32), size)
        total = _resized(np.where(valid, image, np.float32(0)), size)
        return np.where(share >= HALF, total / np.maximum(share, HALF), np.float32(0))
    resized = functional.interpolate(torch.from_numpy(image), (size, size), mode="bilinear", antialias=True)
    return np.asarray(resized.numpy(), dtype=np.float32)


def _all_held(masks: Sequence[Mask], size: int | None) -> NDArray[np.uint8]:
    """Return the mask [1, H, W] of resized pixels that all masks [H, W] give data: 1, else 0."""
    return np.asarray(np.logical_and.reduce([_held(mask, size) for mask in masks]), np.uint8)


def _held(valid: Mask, size: int | None) -> Mask:
    """Return the mask [1, H, W] of resized pixels that a mask [H, W] gives data, as `_resized` does."""
    if size is None:
        return valid[None]
    return np.asarray(_resized(valid[None, None].astype(np.float32), size)[0] >= HALF)


def _nearest(mask: NDArray[np.uint8], size: int | None) -> NDArray[np.uint8]:
    if size is None:
        return mask
    resized = functional.interpolate(torch.from_numpy(mask), (size, size), mode="nearest")
    return np.asarray(resized.numpy(), dtype=np.uint8)
