"""Small datasets of procedural scenes in WorldStrat's layout, for the demo and the tests.

A scene is painted at 1.5 m (`terrain`) and imaged by two instruments. SPOT: a panchromatic band at full detail,
colours at 6 m, and the pansharpened product of both. Sentinel-2: every revisit through a wider point spread, with a
sub-pixel shift, the season's colours, haze, clouds, their shadows, and noise.
"""

from __future__ import annotations

import csv
import json
import warnings
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning
from rasterio.session import DummySession
from rasterio.transform import Affine
from torch.nn import functional

from sharding.sources.synthetic.terrain import Image, Land, fractal, make_land

HR_SIDE = 1054
"""Side of the real 1.5 m rasters, px."""
LR_PER_HR = 0.15
"""Ratio of the LR side to the HR side: a 10 m pixel of Sentinel-2 is as wide as 6.67 SPOT pixels."""
PAN_WEIGHTS = np.array([0.36, 0.34, 0.22, 0.08], np.float32)
PSF_LR_PX = 0.42
"""Standard deviation of Sentinel-2's point spread in its own pixels: a response of about 0.4 at its Nyquist frequency,
which keeps the aliasing that several shifted revisits can undo."""
# Each L2A band in order (B01 ... B12 without B10) as a mix of red, green, blue, near infrared.
L2A_MIX = np.array(
    [
        [0.0, 0.1, 0.8, 0.00],
        [0.0, 0.0, 1.0, 0.00],
        [0.0, 1.0, 0.0, 0.00],
        [1.0, 0.0, 0.0, 0.00],
        [0.7, 0.2, 0.0, 0.15],
        [0.2, 0.2, 0.0, 0.65],
        [0.1, 0.1, 0.0, 0.85],
        [0.0, 0.0, 0.0, 1.00],
        [0.1, 0.0, 0.0, 0.97],
        [0.2, 0.0, 0.0, 0.90],
        [1.1, 0.3, 0.0, 0.25],
        [0.9, 0.2, 0.0, 0.10],
    ],
    dtype=np.float32,
)
# The change of a fully green pixel from the height of the season to its end.
SENESCENCE = np.array([0.07, 0.035, 0.02, -0.12], np.float32)
NAME_STYLES = ("Landcover-{n}", "Amnesty POI-{m}-2-2", "UNHCR-GRCs{n:06d}", "ASMSpotter-{m}-1-1")
SPLIT_COLUMNS = ("", "tile", "IPCC Class", "SMOD", "source", "joint_class", "split")


@dataclass(frozen=True)
class _Place:
    """Properties that all rasters of one AOI share."""

    name: str
    folder: Path
    """Folder of the dataset."""
    bounds: tuple[float, float, float, float]
    """West, south, east, north in degrees."""
    shape: tuple[int, int]
    """Rows and columns of its L2A rasters."""
    taken: date
    """Day of the SPOT image."""
    offset: NDArray[np.float64]
    """Shift of SPOT against the revisits, down and right, in rows and columns of L2A pixels."""

    @property
    def lr_transform(self) -> Affine:
        """Georeference of the L2A rasters."""
        west, south, east, north = self.bounds
        return Affine((east - west) / self.shape[1], 0.0, west, 0.0, (south - north) / self.shape[0], north)


@dataclass(frozen=True)
class _Revisit:
    """One Sentinel-2 image."""

    bands: Image
    """[12, h, w] reflectance."""
    cloud: Image
    """[h, w] opacity of the clouds, 0 to 1."""
    shadow: NDArray[np.bool_]
    """[h, w] mask of ground in a cloud's shadow."""
    taken: date


def write_worldstrat(
    folder: str | Path,
    aois: int,
    seed: int,
    *,
    revisits: int = 8,
    hr_side: int = HR_SIDE,
    split_file: bool = False,
    l1c: bool = False,
    offset: tuple[float, float] = (0.0, 0.0),
) -> list[str]:
    """Write a dataset in WorldStrat's folder layout.

    Names hold spaces and hyphens, L2A sizes differ between AOIs, some AOIs have SCL rasters and the longer
    metadata, some have a SPOT border without data. A seed gives the same pixels everywhere.

    Args:
        folder: Destination of ``hr_dataset`` and ``lr_dataset``; created if it does not exist.
        aois: Number of AOIs.
        seed: Seed of everything random.
        revisits: Sentinel-2 images per AOI.
        hr_side: Side of the 1.5 m rasters, px; a smaller one shows less land, and the L2A rasters shrink with it.
        l1c: Also write the L1C product of the revisits: 13 bands and no masks.
        split_file: Also write ``stratified_train_val_test_split.csv`` (8 : 1 : 1).
        offset: Mean shift of the 1.5 m rasters against the revisits, down and right, in rows and columns of their
            pixels, as between two products with different georeferences.

    Returns:
        The AOIs' names in the order of creation.
    """
    folder = Path(folder)
    names = [
        _write_aoi(folder, i, np.random.default_rng([seed, i]), revisits, hr_side, offset, l1c) for i in range(aois)
    ]
    if split_file:
        _write_split_file(folder, names)
    return names


def _write_aoi(
    folder: Path,
    number: int,
    rng: np.random.Generator,
    revisits: int,
    hr_side: int,
    offset: tuple[float, float],
    l1c: bool,
) -> str:
    style = NAME_STYLES[number % len(NAME_STYLES)]
    base = round(hr_side * LR_PER_HR)
    lon, lat = float(rng.uniform(-120, 140)), float(rng.uniform(-45, 60))
    half = hr_side * 1.5 / 2 / 111_320
    wide = half / float(np.cos(np.radians(lat)))
    name = style.format(n=100_000 + 7 * number + int(rng.integers(7)), m=number + 1)
    shape = (base + int(rng.integers(-2, 6)), base + int(rng.integers(-5, 4)))
    place = _Place(
        name=name,
        folder=folder,
        bounds=(lon - wide, lat - half, lon + wide, lat + half),
        shape=shape,
        taken=date(2018, 5, 1) + timedelta(days=int(rng.integers(120))),
        offset=np.array(offset) * shape / hr_side,
    )
    land = make_land(rng, hr_side)
    _write_spot(place, land, rng, bordered=number % 3 == 1)
    gain = 1 + 0.04 * rng.standard_normal(4).astype(np.float32)
    wide_land = _through_psf(land, hr_side / base)
    for n in range(1, revisits + 1):
        revisit = _see(place, wide_land, gain, rng, cloudy=n > 1 and rng.random() < 0.4)
        _write_revisit(place, n, revisit, land_cover=number % 4 != 1)
        if l1c:
            _write_l1c(place, n, revisit)
    return place.name


def _write_spot(place: _Place, land: Land, rng: np.random.Generator, *, bordered: bool) -> None:
    """Write ``_pan``, ``_ps`` and ``_rgbn`` as the instrument and its ground segment produce them."""
    side = land.bands.shape[-1]
    sharp = _blur(torch.from_numpy(land.bands), 0.55).numpy()
    pan = np.tensordot(PAN_WEIGHTS, sharp, 1)[None]
    pan += 0.0012 * rng.standard_normal(pan.shape, dtype=np.float32)
    coarse = round(side / 4)
    colours = _resize(sharp, (coarse, coarse))
    colours += 0.0008 * rng.standard_normal(colours.shape, dtype=np.float32)
    # Pansharpening of the product: colours at 6 m times the ratio of PAN to PAN at 6 m.
    low_pan = _resize(_resize(pan, (coarse, coarse)), (side, side))
    ps = _resize(colours, (side, side)) * np.clip(pan / np.maximum(low_pan, 0.005), 0.2, 3.0)
    rasters = {"pan": pan, "ps": ps, "rgbn": colours}
    for suffix, image in rasters.items():
        counts = np.clip(np.round(image * 10_000), 1, 65_535).astype(np.uint16)
        if bordered:
            y, x = np.mgrid[: image.shape[1], : image.shape[2]] / image.shape[1]
            counts[:, x + 0.03 * y < 0.02] = 0
        path = place.folder / "hr_dataset" / place.name / f"{place.name}_{suffix}.tiff"
        # The published SPOT rasters carry no real georeference.
        _write_raster(path, counts, Affine.identity(), compress=suffix == "ps")


def _through_psf(land: Land, scale: float) -> torch.Tensor:
    """Return bands, greenness and water [6, S, S], blurred by Sentinel-2's optics."""
    layers = np.concatenate([land.bands, land.greenness[None], land.water[None].astype(np.float32)])
    return _blur(torch.from_numpy(layers), PSF_LR_PX * scale)


def _see(place: _Place, land: torch.Tensor, gain: Image, rng: np.random.Generator, *, cloudy: bool) -> _Revisit:
    """Make one Sentinel-2 image of the blurred land."""
    days = int(rng.integers(-60, 61))
    seen = _sample(land, place.shape, rng.uniform(-0.5, 0.5, 2) + place.offset).numpy()
    season = min(1.0, max(-0.2, days / 80 + rng.normal(0, 0.05)))
    bands = seen[:4] + SENESCENCE[:, None, None] * (0.6 * float(season)) * seen[4]
    bands *= (0.96 * gain + 0.02 * rng.standard_normal(4).astype(np.float32))[:, None, None]
    haze = np.array([0.5, 0.8, 1.3, 0.2], np.float32) * np.float32(rng.exponential(0.006))
    bands += haze[:, None, None]
    cloud, shadow, veil = _clouds(rng, place.shape) if cloudy else (np.zeros(place.shape, np.float32),) * 3
    bands = (bands + veil) * (1 - 0.5 * shadow)
    bands = bands * (1 - cloud) + cloud * (0.62 + 0.35 * cloud)
    full = np.tensordot(L2A_MIX, bands, 1)
    full += 0.0018 * rng.standard_normal(full.shape, dtype=np.float32)
    counts = np.round(np.clip(full, 1e-4, None) * 10_000)
    taken = place.taken + timedelta(days=days)
    return _Revisit((counts / 10_000).astype(np.float32), cloud, shadow > 0.3, taken)


def _clouds(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Image, Image, Image]:
    """Return opacity of clouds, depth of their shadows and reflectance of the thin veil between them, each [h, w]."""
    side = max(shape)
    cover = fractal(rng, side, 1.7, 0.5)
    cloud = np.clip((cover - np.quantile(cover, rng.uniform(0.55, 0.97))) * 1.6, 0, 1)
    shadow = np.roll(cloud, (-9, -8), (0, 1)) * (cloud < 0.3)
    veil = np.clip(0.03 + 0.015 * fractal(rng, side, 2.0), 0.01, None)
    window = (slice(shape[0]), slice(shape[1]))
    return cloud[window], shadow[window], veil[window]


def _write_revisit(place: _Place, n: int, revisit: _Revisit, *, land_cover: bool) -> None:
    """Write one revisit's rasters and metadata; ``land_cover`` AOIs have SCL and the longer metadata."""
    stem = place.folder / "lr_dataset" / place.name / "L2A" / f"{place.name}-{n}"
    cloud = (revisit.cloud > 0.3).astype(np.float32)
    layers = {
        "L2A_data": revisit.bands,
        "CLM": cloud[None],
        "CLP": np.round(revisit.cloud * 255)[None].astype(np.float32),
        "dataMask": np.ones((1, *cloud.shape), np.float32),
    }
    if land_cover:
        red, nir = revisit.bands[3], revisit.bands[7]
        surface = np.where(nir > 2.2 * red, 4, np.where(nir < 0.05, 6, 5))
        surface = np.where(revisit.shadow, 3, surface)
        layers["SCL"] = np.where(cloud > 0, 9, surface)[None].astype(np.float32)
    for name, image in layers.items():
        _write_raster(Path(f"{stem}-{name}.tiff"), image, place.lr_transform, nodata=0.0)
    cover = round(100 * float(cloud.mean()), 2)
    metadata = _metadata(place, n, revisit.taken, cover, long=land_cover)
    Path(f"{stem}.metadata").write_text(json.dumps(metadata))


def _write_l1c(place: _Place, n: int, revisit: _Revisit) -> None:
    """Write the revisit at top of atmosphere: the air adds light, least in the red; there is a cirrus band (B10)."""
    air = np.linspace(0.08, 0.01, len(revisit.bands), dtype=np.float32)[:, None, None]
    cirrus = (0.001 + 0.01 * revisit.cloud + 0.002 * revisit.bands[0])[None]
    bands = np.concatenate([(0.95 * revisit.bands + air)[:10], cirrus, (0.95 * revisit.bands + air)[10:]])
    path = place.folder / "lr_dataset" / place.name / "L1C" / f"{place.name}-{n}-L1C_data.tiff"
    _write_raster(path, bands.astype(np.float32), place.lr_transform, nodata=0.0)


def _metadata(place: _Place, n: int, taken: date, cover: float, *, long: bool) -> dict[str, object]:
    """Return one of the two key sets that the published files have."""
    delta = (taken - place.taken).days
    if not long:
        return {
            "cloud_cover": cover,
            "target_date": str(place.taken),
            "delta": str(delta),
            "area": 2.5,
            "datetime": str(taken),
        }
    west, south, east, north = place.bounds
    return {
        "n": n,
        "lon": (west + east) / 2,
        "lat": (south + north) / 2,
        "bounds": str(list(place.bounds)),
        "lowres_date": str(taken),
        "highres_date": str(place.taken),
        "delta": delta,
        "rank": float(abs(delta) + cover),
        "cloud_cover": cover,
        "area": 2.5,
        "LCCS": 10,
        "SMOD": "Rural: Low Dens",
        "IPCC": "Agriculture",
    }


def _write_split_file(folder: Path, names: list[str]) -> None:
    """Write the split file with the published columns; every tenth AOI is ``val``, every tenth ``test``."""
    with (folder / "stratified_train_val_test_split.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(SPLIT_COLUMNS)
        for i, name in enumerate(names):
            split = {8: "val", 9: "test"}.get(i % 10, "train")
            source = name.split("-")[0].split(" ")[0]
            row = (i * 16, name, "Agriculture", 11, source, f"{source}/Agriculture/11", split)
            writer.writerow(row)


def _write_raster(
    path: Path,
    image: NDArray[np.generic],
    transform: Affine,
    *,
    nodata: float | None = None,
    compress: bool = False,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"compress": "deflate", "predictor": 2, "zlevel": 1} if compress else {}
    count, height, width = image.shape
    # A session of its own: in an environment with S3 keys rasterio would open a new S3 session for every file.
    with warnings.catch_warnings(), rasterio.Env(DummySession()):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # SPOT's identity transform is meant
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            count=count,
            height=height,
            width=width,
            dtype=image.dtype,
            crs=CRS.from_epsg(4326),
            transform=transform,
            nodata=nodata,
            **options,
        ) as file:
            file.write(image)


def _blur(layers: torch.Tensor, deviation: float) -> torch.Tensor:
    """Blur [N, S, S] by a Gaussian with this standard deviation, px."""
    reach = max(1, round(3.5 * deviation))
    kernel = torch.exp(-(torch.arange(-reach, reach + 1, dtype=torch.float32) ** 2) / (2 * deviation**2))
    kernel = (kernel / kernel.sum())[None, None]
    padded = functional.pad(layers[:, None], (reach, reach, reach, reach), mode="replicate")
    return functional.conv2d(functional.conv2d(padded, kernel[..., None]), kernel[:, :, None])[:, 0]


def _resize(image: Image, shape: tuple[int, int]) -> Image:
    """Resize [N, H, W] by antialiased bilinear interpolation."""
    resized = functional.interpolate(
        torch.from_numpy(np.ascontiguousarray(image))[None], shape, mode="bilinear", antialias=True
    )
    return np.asarray(resized[0].numpy(), dtype=np.float32)


def _sample(layers: torch.Tensor, shape: tuple[int, int], offset: NDArray[np.float64]) -> torch.Tensor:
    """Sample [N, S, S] at the centres of a coarse grid, moved by ``offset`` (rows, columns) coarse px."""
    axes = [
        (2 * torch.arange(n, dtype=torch.float32) + 1 + 2 * float(move)) / n - 1
        for n, move in zip(shape, offset, strict=True)
    ]
    y, x = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([x, y], dim=-1)[None]
    return functional.grid_sample(layers[None], grid, padding_mode="reflection", align_corners=False)[0]
