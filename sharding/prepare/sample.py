"""Sample of one AOI: read, check, choose, prepare, describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharding.errors import RevisitError, UnusableError
from sharding.format.entries import Content
from sharding.format.layout import VALID
from sharding.format.writer import NewSample
from sharding.prepare.agreement import agreement_of
from sharding.prepare.checks import check_plausible, unusual_values
from sharding.prepare.options import SampleOptions
from sharding.prepare.scene import Prepared, choose_revisits, prepare, quantise
from sharding.sources.source import NO_CLM, Scene, SceneFiles

Seen = NDArray[np.bool_]


def make_sample(aoi: SceneFiles, options: SampleOptions) -> NewSample:
    """Make an AOI's sample. The same files and options give the same sample.

    A revisit that shows nothing, or whose size is not that of most, is passed over if enough others remain.

    Args:
        aoi: Its files, which pass ``check``.
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
                aoi.check(options)  # a revisit that takes its place may lack a file
            except UnusableError:
                raise passed[0] from None


def _make(aoi: SceneFiles, options: SampleOptions) -> NewSample:
    scene = aoi.read(options)
    chosen = choose_revisits(scene, options)
    seen = check_pictures(scene, chosen.revisits)
    check_plausible(scene, chosen.revisits)
    clouds = [cloud_percent(scene, index) for index in chosen.revisits]
    cloud = _mean(clouds)
    if options.max_cloud is not None and cloud is not None and cloud > options.max_cloud:
        raise UnusableError(
            "too-cloudy", f"{cloud:.1f} % of its revisits are clouds, the most is {options.max_cloud:g}"
        )
    prepared = prepare(scene, chosen.revisits, options)
    if prepared.valid is not None and not prepared.valid.any():
        raise UnusableError("no-data", "no pixel has data in both its target and its PAN")
    images, saturated = stored_images({"lr": prepared.lr, "hr": prepared.hr, "pan": prepared.pan}, options)
    meta = {
        "aoi": scene.aoi,
        **scene.facts,
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
        "georeference": scene.georeference,
        "saturated": saturated,
        "nodata_fraction": {name: _share(~where) for name, where in seen.items()},
        "sources": dict(scene.sources),
        **unusual_values(scene, chosen.revisits),
    }
    masks = {"clm": prepared.clm, **({} if prepared.valid is None else {VALID: prepared.valid})}
    return NewSample(scene.aoi, {**images, **masks}, meta, _content(scene, prepared), scene.bytes_in)


def _content(scene: Scene, prepared: Prepared) -> Content:
    """Compare the prepared revisits with the prepared target, band by band if they have the same, else in colours."""
    same = prepared.lr.shape[1] == prepared.hr.shape[0]
    bands = (range(len(prepared.hr)),) * 2 if same else (scene.rgb, range(len(prepared.hr)))
    clear = (prepared.lr != 0).any(axis=1, keepdims=True) & (prepared.clm != 1)
    seen = (prepared.hr != 0).any(axis=0)
    return agreement_of(prepared.lr, clear, prepared.hr, seen, bands, scene.land)


def check_pictures(scene: Scene, chosen: Sequence[int]) -> dict[str, Seen]:
    """Refuse a scene with an image that shows nothing: no data, or a band that is constant wherever it has data.

    Returns:
        Masks [H, W] of the pixels with data, of ``pan`` and, if the scene has a target, of ``hr``.

    Raises:
        UnusableError: ``no-data`` or ``degenerate``; a RevisitError if it is a revisit.
    """
    seen = {"hr": scene.hr_valid, "pan": scene.pan_valid} if len(scene.hr) else {"pan": scene.pan_valid}
    for image, mask in seen.items():
        _check_picture(scene.titles[image], getattr(scene, image), mask, scene.labels[image])
    for index in chosen:
        number = scene.revisits[index].number
        try:
            _check_picture(f"revisit {number}", scene.lr[index], scene.valid[index][0], scene.labels["lr"])
        except UnusableError as error:
            raise RevisitError(error.reason, error.detail, number) from None
    return seen


def _check_picture(name: str, image: NDArray[Any], where: Seen, names: Sequence[str]) -> None:
    if not where.any():
        raise UnusableError("no-data", f"{name} holds no data")
    row, column = np.unravel_index(where.argmax(), where.shape)
    value = image[:, row, column]
    varied = ((image != value[:, None, None]) & where).reshape(len(image), -1).any(axis=1)
    if not (varied.any() or value.any()):
        raise UnusableError("no-data", f"{name} is all zero")
    if not varied.all():
        band = int(varied.argmin())
        raise UnusableError("degenerate", f"band {names[band]} of {name} is {value[band]:g} wherever it has data")


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
