"""Sharding against its floor, two workers against one, and the writer against others' writers.

``python -m benchmarks.sharding [--worldstrat DIR]``; for the writers see ``benchmarks/peers.py``. The floor decodes the
same bands of the same rasters, resizes them by the same calls, rounds and writes them, and does nothing else: no plan,
no checks, no choice of the clearest revisit, no digests, no statistics, no index. It has two forms: one opens rasters
by their paths, as a script does, the other configures and feeds GDAL like ours.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from torch.nn import functional

from benchmarks import peers
from benchmarks.trees import plant
from sharding.format.writer import NewSample, ShardWriter
from sharding.prepare.options import SampleOptions
from sharding.prepare.sample import make_sample
from sharding.run.dataset import ShardOptions, shard_folder
from sharding.sources.worldstrat.files import SourceFile, open_source
from sharding.sources.worldstrat.layout import AoiFiles, find_aois
from sharding.sources.worldstrat.rasters import _gdal, _Reader
from sharding.storage import open_storage

SHARD_BYTES = 64 << 20

Read = Callable[[SourceFile, list[int]], NDArray[np.generic]]


def by_path(file: SourceFile, bands: list[int]) -> NDArray[np.generic]:
    """Read bands of a raster."""
    with rasterio.open(file.path) as raster:
        return raster.read(bands)


def as_ours(file: SourceFile, bands: list[int]) -> NDArray[np.generic]:
    """Read bands of a raster from memory, through our reader without its digest."""
    with patch.object(_Reader, "_bytes", lambda self, file: file.read()), _Reader().open(file, bands) as raster:
        return raster.read(bands)


def floor(aois: Sequence[AoiFiles], output: Path, read: Read) -> None:
    """Decode, resize, round, write."""
    with output.open("wb") as file:
        for aoi in aois:
            revisits = list(aoi.candidates(SampleOptions()).values())
            lr = np.stack([read(revisit["L2A_data"], [4, 3, 2]) for revisit in revisits])
            masks = {
                layer: [read(revisit[layer], [1]) for revisit in revisits if layer in revisit]
                for layer in ("CLM", "SCL", "dataMask")
            }
            spot = [read(aoi.hr["ps"], [1, 2, 3])[None], read(aoi.hr["pan"], [1])[None]]
            clm = torch.from_numpy(np.stack(masks["CLM"]).astype(np.uint8))
            images = [torch.from_numpy(lr)] + [torch.from_numpy(image.astype(np.float32)) / 10000 for image in spot]
            for image, size in zip(images, (160, 500, 500), strict=True):
                resized = functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
                file.write((resized.double() / 3e-5).round_().clamp_(0, 65535).numpy().astype(np.uint16))
            file.write(functional.interpolate(clm, (160, 160), mode="nearest").numpy())


def ours(tree: Path, output: Path) -> None:
    """Shard a whole tree."""
    shard_folder(tree, open_storage(output), ShardOptions(), say=lambda _: None)


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def one_core() -> Iterator[None]:
    """Restrict this process to one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


def against_floor(folder: Path, worldstrat: Path | None, aois: int, repeats: int) -> None:
    """Print the rate on one core beside both floors'."""
    plant(folder / "tree", aois, worldstrat)
    places = find_aois(open_source(folder / "tree", "l2a"))
    sets = {
        "floor, rasters by path": lambda turn: floor(places, folder / "floor", by_path),
        "floor, rasters as ours": lambda turn: _in_gdal(lambda: floor(places, folder / "floor", as_ours)),
        "satfusion shard": lambda turn: ours(folder / "tree", folder / f"dataset-{turn}"),
    }
    times: dict[str, list[float]] = {name: [] for name in sets}
    with one_core():
        for turn in range(repeats + 1):
            for name, work in sets.items():
                times[name].append(seconds(lambda work=work, turn=turn: work(turn)))  # type: ignore[misc]
    medians = {name: statistics.median(values[1:]) / aois for name, values in times.items()}
    print(f"{'one core, ' + str(aois) + ' AOIs':28}{'ms an AOI':>12}{'of its rate':>14}")
    for name, each in medians.items():
        print(f"{name:28}{1000 * each:>12.1f}{each / medians['satfusion shard']:>13.0%}")


def _in_gdal(work: Callable[[], None]) -> None:
    with _gdal():
        work()


def workers(folder: Path, worldstrat: Path | None, aois: int, repeats: int) -> None:
    """Print the time of the command with one worker and with two, including the start of its processes."""
    plant(folder / "many", aois, worldstrat)
    times: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(repeats):
        for count in times:
            command = [sys.executable, "-m", "cluster.cli", "shard", "--input", str(folder / "many")]
            command += ["--output", str(folder / f"many-{count}-{turn}"), "--workers", str(count)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            run = lambda c=command, e=environment: subprocess.run(c, env=e, check=True, capture_output=True)  # noqa: E731
            times[count].append(seconds(run))
    one, two = (statistics.median(times[count]) for count in (1, 2))
    print(f"\n{aois} AOIs: one worker {one:.1f} s, two {two:.1f} s, {one / two:.2f}x")


def write_ours(samples: Sequence[NewSample], folder: Path) -> None:
    """Write shards by our writer."""
    number = 0
    file = (folder / "0.tar").open("wb")
    writer = ShardWriter(file)
    for sample in samples:
        if writer.size > SHARD_BYTES:
            writer.finish(f"{number}.tar")
            file.close()
            number += 1
            file = (folder / f"{number}.tar").open("wb")
            writer = ShardWriter(file)
        writer.add(sample)
    writer.finish(f"{number}.tar")
    file.close()


class NoDigest:
    """A replacement of SHA-256 that does nothing."""

    def update(self, data: object) -> None:
        """Do nothing."""

    def hexdigest(self) -> str:
        """Return an empty digest."""
        return ""


def write_without(samples: Sequence[NewSample], folder: Path) -> None:
    """Write shards by our writer, without its digests."""
    with patch("sharding.format.writer.hashlib.sha256", NoDigest), patch("sharding.format.writer.crc32", lambda *_: 0):
        write_ours(samples, folder)


def write_webdataset(samples: Sequence[NewSample], folder: Path) -> None:
    """Write shards by WebDataset's ShardWriter."""
    import webdataset

    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxsize=SHARD_BYTES, verbose=0, mtime=0) as writer:
        for sample in samples:
            members = {f"{name}.npy": image for name, image in sample.images.items()}
            writer.write({"__key__": sample.aoi, **members, "json": sample.meta})


def write_mds(samples: Sequence[NewSample], folder: Path) -> None:
    """Write shards by MosaicML Streaming's MDSWriter: shapes and types fixed, no compression, no hashes."""
    from streaming import MDSWriter

    shapes = {
        name: f"ndarray:{image.dtype}:{','.join(map(str, image.shape))}" for name, image in samples[0].images.items()
    }
    columns = {"aoi": "str", **shapes, "json": "json"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES) as writer:
        for sample in samples:
            writer.write({"aoi": sample.aoi, **sample.images, "json": dict(sample.meta)})


def writers(folder: Path, worldstrat: Path | None, repeats: int) -> None:
    """Print the rate of each writer, fed the same prepared arrays."""
    plant(folder / "few", 6, worldstrat)
    made = [make_sample(aoi, SampleOptions()) for aoi in find_aois(open_source(folder / "few", "l2a"))]
    samples = [NewSample(f"{turn} {sample.aoi}", sample.images, sample.meta) for turn in range(20) for sample in made]
    size = sum(image.nbytes for sample in samples for image in sample.images.values())
    forms = {
        "ours, with digests": write_ours,
        "ours, without": write_without,
        "WebDataset ShardWriter": write_webdataset,
        "MosaicML MDSWriter": write_mds,
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats + 1):
        for name, write in forms.items():
            with tempfile.TemporaryDirectory(dir=folder) as target:
                times[name].append(seconds(lambda write=write, target=target: write(samples, Path(target))))  # type: ignore[misc]
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    fastest = min(medians["WebDataset ShardWriter"], medians["MosaicML MDSWriter"])
    print(f"\n{str(size >> 20) + ' MiB of samples':28}{'MB/s':>12}{'of the faster peer':>20}")
    for name, each in medians.items():
        print(f"{name:28}{size / each / 1e6:>12.0f}{fastest / each:>19.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worldstrat", type=Path, help="a WorldStrat folder (default: generated AOIs)")
    parser.add_argument("--aois", type=int, default=60)
    parser.add_argument("--many", type=int, default=600, help="AOIs for the workers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--part", choices=("floor", "workers", "writers"), help="only this one")
    options = parser.parse_args()
    peers.enable()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.part in (None, "floor"):
            against_floor(folder, options.worldstrat, options.aois, options.repeats)
        if options.part in (None, "workers"):
            workers(folder, options.worldstrat, options.many, max(3, options.repeats // 2))
        if options.part in (None, "writers"):
            writers(folder, options.worldstrat, options.repeats)


if __name__ == "__main__":
    main()
