"""Scenes of made-up sensors, written with rasterio and h5py alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.warp import transform as transform_points
from rasterio.warp import transform_bounds

from sharding.sources.synthetic.terrain import make_land

EAST, NORTH = 500_000.0, 5_400_000.0
"""Upper left corner of the land in UTM, m."""

Image = NDArray[np.float32]


class Land:
    """Land of red, green, blue and near infrared, known at every point: painted at `step` m and interpolated."""

    def __init__(self, seed: int, side: int, step: float, west: float = EAST, north: float = NORTH) -> None:
        self.bands = make_land(np.random.default_rng(seed), side).bands
        self.step, self.west, self.north = step, west, north

    def at(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> Image:
        """Return [4, ...] reflectance at UTM coordinates, bilinear between the painted pixels' centres."""
        column, row = (x - self.west) / self.step - 0.5, (self.north - y) / self.step - 0.5
        last = self.bands.shape[-1] - 1
        column, row = np.clip(column, 0, last), np.clip(row, 0, last)
        left, top = np.floor(column).astype(int), np.floor(row).astype(int)
        right, bottom = np.minimum(left + 1, last), np.minimum(top + 1, last)
        a, b = column - left, row - top
        return (
            self.bands[:, top, left] * (1 - a) * (1 - b)
            + self.bands[:, top, right] * a * (1 - b)
            + self.bands[:, bottom, left] * (1 - a) * b
            + self.bands[:, bottom, right] * a * b
        ).astype(np.float32)

    def image(self, transform: Affine, shape: tuple[int, int], parts: int, to_utm: CRS | None = None) -> Image:
        """Return [4, h, w], each pixel the mean of `parts` x `parts` points in it."""
        rows, columns = shape
        total = np.zeros((4, rows, columns), np.float32)
        for i in range(parts):
            for j in range(parts):
                column, row = np.meshgrid(np.arange(columns) + (j + 0.5) / parts, np.arange(rows) + (i + 0.5) / parts)
                x, y = transform @ (column, row)
                if to_utm is not None:
                    xs, ys = transform_points(to_utm, CRS.from_epsg(32631), x.ravel(), y.ravel())
                    x, y = np.reshape(xs, x.shape), np.reshape(ys, y.shape)
                total += self.at(x, y)
        return total / parts**2


def write_tiff(path: Path, image: NDArray[np.generic], transform: Affine, crs: CRS | None, **more: object) -> None:
    """Write a GeoTIFF; `names` are the bands' descriptions."""
    names = more.pop("names", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = image.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": image.dtype.name}
    with rasterio.open(path, "w", **profile, crs=crs, transform=transform, **more) as file:
        file.write(image)
        if names:
            file.descriptions = names


def counts(image: Image, scale: float = 1e-4) -> NDArray[np.uint16]:
    return np.clip(np.round(image / scale), 1, 65535).astype(np.uint16)


RGBN_TOML = """\
[revisits]
files = "{scene}/lr_{date}.tif"
bands = ["red", "green", "blue", "nir"]
scale = 0.0001

[pan]
files = "{scene}/pan.tif"
scale = 0.0001

[target]
files = "{scene}/ms.tif"
scale = 0.0001
"""


def write_rgbn(folder: Path, scenes: int, *, side: int = 480, dates: int = 3) -> None:
    """Write RGB + NIR at ratio 4 in UTM: PAN and target of 2.5 m, revisits of 10 m in another order of bands."""
    utm = CRS.from_epsg(32631)
    for number in range(scenes):
        west = EAST + 20_000 * number
        rng = np.random.default_rng(number)
        land = Land(number, side, 2.5, west)
        fine, coarse = Affine(2.5, 0, west, 0, -2.5, NORTH), Affine(10, 0, west, 0, -10, NORTH)
        image = land.image(fine, (side, side), 1)
        place = folder / f"scene{number}"
        write_tiff(place / "ms.tif", counts(image), fine, utm, names=("R", "G", "B", "N"), tiled=True)
        write_tiff(place / "pan.tif", counts(image.mean(0, keepdims=True)), fine, utm)
        for visit in range(dates):
            shift = Affine.translation(*rng.uniform(-4, 4, 2))  # each date has an origin of its own
            moved = shift @ coarse
            seen = land.image(moved, (side // 4, side // 4), 4)
            seen = seen + 0.003 * rng.standard_normal(seen.shape).astype(np.float32)
            write_tiff(
                place / f"lr_2020-0{visit + 5}-11.tif",
                counts(seen[[2, 1, 0, 3]]),
                moved,
                utm,
                names=("B02", "B03", "B04", "B08"),
            )
    (folder / "scenes.toml").write_text(RGBN_TOML)


TWO_CRS_TOML = """\
[revisits]
files = "{scene}/s2_{date}.tif"
scale = 0.0001
order = ["red", "green", "blue"]

[pan]
files = "{scene}/pan.tif"
scale = 0.0001

[target]
files = "{scene}/ms.tif"
scale = 0.0001
order = ["red", "green", "blue"]
"""


def write_two_crs(folder: Path, shapes: Sequence[tuple[int, int]], *, dates: int = 2) -> None:
    """Write PAN and target of 1.5 m in UTM 31, and revisits of 10 m in UTM 32: a ratio of 20/3."""
    utm, other = CRS.from_epsg(32631), CRS.from_epsg(32632)
    for number, (rows, columns) in enumerate(shapes):
        west = EAST + 200_000 + 20_000 * number
        rng = np.random.default_rng(100 + number)
        land = Land(50 + number, max(rows, columns) // 2, 3.0, west)
        fine = Affine(1.5, 0, west, 0, -1.5, NORTH)
        image = land.image(fine, (rows, columns), 1)[:3]
        place = folder / f"site {number}"
        write_tiff(place / "ms.tif", counts(image), fine, utm, tiled=True)
        write_tiff(place / "pan.tif", counts(image.mean(0, keepdims=True)), fine, utm)
        corners = transform_bounds(utm, other, west, NORTH - 1.5 * rows, west + 1.5 * columns, NORTH, densify_pts=21)
        left, bottom, right, top = (10 * round(value / 10) for value in corners)
        for visit in range(dates):
            dx, dy = rng.uniform(-5, 5, 2)
            coarse = Affine(10, 0, left - 100 + dx, 0, -10, top + 100 + dy)
            shape = (round((top - bottom) / 10) + 20, round((right - left) / 10) + 20)
            seen = land.image(coarse, shape, 4, other)[:3]
            write_tiff(place / f"s2_2021070{visit + 1}.tif", counts(seen), coarse, other)
    (folder / "scenes.toml").write_text(TWO_CRS_TOML)


def write_hdf5(path: Path, patches: int, *, bands: int = 8, bits: int = 11, seed: int = 0) -> None:
    """Write an HDF5 file of patches: ms [N, C, 64, 64], lms, pan and gt [N, C, 256, 256], counts of `bits` bits."""
    rng = np.random.default_rng(seed)
    most = 2**bits - 1
    mixing = rng.uniform(0, 1, (bands, 4)).astype(np.float32)
    mixing /= mixing.sum(1, keepdims=True)
    gt = np.stack([np.tensordot(mixing, make_land(rng, 256).bands, 1) for _ in range(patches)])
    ms = gt.reshape(patches, bands, 64, 4, 64, 4).mean((3, 5))
    lms = ms.repeat(4, -1).repeat(4, -2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, image in {"gt": gt, "ms": ms, "lms": lms, "pan": gt.mean(1, keepdims=True)}.items():
            file[name] = np.round(np.clip(image * 2, 0, 1) * most).astype(np.float32)
