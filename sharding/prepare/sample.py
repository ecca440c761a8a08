"""Sample of one AOI: read, check, choose, prepare, describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharding.errors import RevisitError, UnusableError
from sharding.format.writer import NewSample
from sharding.prepare.options import SampleOptions
from sharding.prepare.scene import Prepared, choose_revisits, prepare, quantise
from sharding.sources.worldstrat.layout import AoiFiles, check_files
from sharding.sources.worldstrat.rasters import NO_CLM, SPOT_RGB, Scene, read_scene

GEOREFERENCE = "bounds of the Sentinel-2 rasters divided by each grid's size; the SPOT rasters carry none"

Seen = NDArray[np.bool_]


def make_sample(aoi: AoiFiles, options: SampleOptions) -> NewSample:
    """Make an AOI's sample. The same files and options give the same sample.

    A revisit that shows nothing, or whose size is not that of most, is passed over if enough others remain.

    Args:
        aoi: Its files, which pass ``check_files``.
        options: Options of the sample.

    Raises:
        UnusableError: If it cannot be read, an image shows nothing, or it is cloudier than the options allow.
    """
    passed: list[RevisitError] = []
    while True:
        try:
            return replace(_make(aoi, options), passed=tuple(str(error) for error in passed))
        except RevisitError as error:
            passed.append(error)
            aoi = aoi.without(error.number)
            try:
                check_files(aoi, options)  # a revisit that takes its place may lack a file
            except UnusableError:
                raise passed[0] from None


def _make(aoi: AoiFiles, options: SampleOptions) -> NewSample:
    scene = read_scene(aoi, options)
    chosen = choose_revisits(scene, options)
    seen = check_pictures(scene, chosen.revisits, options)
    clouds = [cloud_percent(scene, index) for index in chosen.revisits]
    cloud = _mean(clouds)
    if options.max_cloud is not None and cloud is not None and cloud > options.max_cloud:
        raise UnusableError(
            "too-cloudy", f"{cloud:.1f} % of its revisits are clouds, the most is {options.max_cloud:g}"
        )
    prepared = prepare(scene, chosen.revisits, options)
    images, saturated = stored_images({"lr": prepared.lr, "hr": prepared.hr, "pan": prepared.pan}, options)
    meta = {
        "aoi": scene.aoi,
        "level": options.level,
        "bands": list(options.band_numbers),
        "step": options.step,
        "clearest": chosen.clearest,
        "cloud_percent": cloud,
        "revisits": [
            {**vars(scene.revisits[index]), "cloud_percent": percent, "nodata_fraction": _share(~scene.valid[index])}
            for index, percent in zip(chosen.revisits, clouds, strict=True)
        ],
        "hr_date": scene.hr_date,
        "crs": scene.crs,
        "bounds": list(scene.bounds),
        **_transforms(scene, prepared),
        "georeference": GEOREFERENCE,
        "saturated": saturated,
        "nodata_fraction": {name: _share(~where) for name, where in seen.items()},
        "sources": dict(scene.sources),
    }
    return NewSample(scene.aoi, {**images, "clm": prepared.clm}, meta, scene.bytes_in)


def check_pictures(scene: Scene, chosen: Sequence[int], options: SampleOptions) -> dict[str, Seen]:
    """Refuse a scene with an image that shows nothing: no data, or a band that is constant wherever it has data.

    Returns:
        Masks [H, W] of the pixels with data, of ``pan`` and, if the scene has a target, of ``hr``.

    Raises:
        UnusableError: ``no-data`` or ``degenerate``; a RevisitError if it is a revisit.
    """
    seen = {name: _seen(image) for name, image in (("hr", scene.hr), ("pan", scene.pan)) if len(image)}
    if "hr" in seen:
        _check_picture(f"the SPOT {options.hr} raster", scene.hr, seen["hr"], SPOT_RGB)
    _check_picture("the SPOT pan raster", scene.pan, seen["pan"], (1,))
    for index in chosen:
        number = scene.revisits[index].number
        try:
            _check_picture(f"revisit {number}", scene.lr[index], scene.valid[index][0], options.band_numbers)
        except UnusableError as error:
            raise RevisitError(error.reason, error.detail, number) from None
    return seen


def _check_picture(name: str, image: NDArray[Any], where: Seen, numbers: Sequence[int]) -> None:
    if not where.any():
        raise UnusableError("no-data", f"{name} holds no data")
    row, column = np.unravel_index(where.argmax(), where.shape)
    value = image[:, row, column]
    varied = ((image != value[:, None, None]) & where).reshape(len(image), -1).any(axis=1)
    if not (varied.any() or value.any()):
        raise UnusableError("no-data", f"{name} is all zero")
    if not varied.all():
        band = int(varied.argmin())
        raise UnusableError("degenerate", f"band {numbers[band]} of {name} is {value[band]:g} wherever it has data")


def _seen(image: NDArray[np.uint16]) -> Seen:
    """Return the mask [h, w] of a SPOT image's pixels with data."""
    if image.min() > 0:
        return np.ones(image.shape[-2:], np.bool_)
    return np.asarray((image != 0).any(axis=0))


def cloud_percent(scene: Scene, index: int) -> float | None:
    """Return the cloud cover of a revisit in percent, by its mask, else by its metadata; None if both are missing."""
    known = scene.clm[index] != NO_CLM
    if not known.any():
        return scene.revisits[index].cloud_cover
    return round(100 * float((scene.clm[index][known] == 1).mean()), 4)


def _mean(percents: Sequence[float | None]) -> float | None:
    known = [percent for percent in percents if percent is not None]
    return round(sum(known) / len(known), 4) if known else None


def stored_images(
    images: dict[str, NDArray[np.float32]], options: SampleOptions
) -> tuple[dict[str, NDArray[np.generic]], dict[str, int]]:
    """Return the images in their stored type, and per image the number of values that were too large for it."""
    if options.dtype == "float32":
        return dict(images), dict.fromkeys(images, 0)
    steps = {name: quantise(image) for name, image in images.items()}
    return {name: values for name, (values, _) in steps.items()}, {name: count for name, (_, count) in steps.items()}


def _transforms(scene: Scene, prepared: Prepared) -> dict[str, list[float]]:
    """Return per image the transform (a, b, c, d, e, f) from pixel to CRS, for its grid over the scene's bounds."""
    sizes = {"lr": prepared.lr.shape, "hr": prepared.hr.shape, "pan": prepared.pan.shape}
    return {
        f"{name}_transform": grid_transform(scene.bounds, height, width) for name, (*_, height, width) in sizes.items()
    }


def grid_transform(bounds: tuple[float, float, float, float], height: int, width: int) -> list[float]:
    """Return the transform (a, b, c, d, e, f) from pixel to CRS of a grid over ``bounds``: west, south, east, north."""
    west, south, east, north = bounds
    return [(east - west) / width, 0.0, west, 0.0, (south - north) / height, north]


def _share(mask: NDArray[np.bool_]) -> float:
    return round(float(mask.mean()), 6)
