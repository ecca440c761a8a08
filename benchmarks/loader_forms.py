"""Ways to read the same chips of the same samples: ours, the floors of memory and link, and other loaders'.

Each fills batches of 32 stored chips, nine of each scene of the training split.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset
from zlib_ng.zlib_ng import crc32

from pipeline.config import DataConfig
from pipeline.data import ChipDataset, TrainLoader
from pipeline.data.chips import chip_window
from pipeline.data.scene_cache import SceneCache
from pipeline.order import CHIPS_PER_SCENE, BatchPlan
from sharding.format.entries import ByteRange, SampleEntry
from sharding.format.index import Index
from sharding.storage import open_storage

BATCH = 32
SIZES = {"lr": (8, 3, 160, 160), "hr": (3, 500, 500), "pan": (1, 500, 500)}
WINDOWS = [chip_window(chip, 3.125) for chip in range(CHIPS_PER_SCENE)]
CHIP_SHAPES = [(8, 3, 50, 50), (3, 156, 156), (1, 156, 156)]
CHIP_BYTES = 2 * sum(int(np.prod(shape)) for shape in CHIP_SHAPES)
THREADS = 8
"""Parallel requests of forms that read from S3."""
PUBLISHED_SCENES = 6

Images = Sequence[Any]
"""LR, HR and PAN, of a scene, a chip or a batch: arrays or tensors."""
See = Callable[[Images], None]
"""Consumer of every batch."""
Epoch = Callable[[int, See], int]
"""Function that delivers an epoch, by its number, and returns its chips."""


@dataclass(frozen=True)
class Place:
    """Input of a form."""

    folder: Path
    """Folder of the tree, the dataset and the peers' copies of it."""
    cache: Path
    """An empty folder."""
    cores: int
    workers: int
    """Worker processes; 0 for none."""

    def index(self) -> Index:
        """Return the dataset's table of contents."""
        return Index.load(open_storage(self.folder / "dataset"))


def cut(scene: Images, window: int) -> Images:
    """Return a chip of a scene, views of it."""
    lr, hr, pan = scene
    x, y, size, hr_x, hr_y, hr_size = WINDOWS[window]
    large = (..., slice(hr_y, hr_y + hr_size), slice(hr_x, hr_x + hr_size))
    return lr[..., y : y + size, x : x + size], hr[large], pan[large]


def cut_all(scenes: Iterable[Images]) -> Iterator[Images]:
    """Yield the nine chips of each scene."""
    for scene in scenes:
        for window in range(CHIPS_PER_SCENE):
            yield cut(scene, window)


class Gather:
    """Memory for one batch, filled repeatedly."""

    def __init__(self, dtype: type = np.uint16) -> None:
        self._images = [np.empty((BATCH, *shape), dtype) for shape in CHIP_SHAPES]

    def __call__(self, chips: Iterable[Images], see: See) -> int:
        """Copy chips into batches; return their number."""
        count = 0
        for count, chip in enumerate(chips, start=1):
            slot = (count - 1) % BATCH
            for image, window in zip(self._images, chip, strict=True):
                image[slot] = window
            if slot == BATCH - 1:
                see(self._images)
        if count % BATCH:
            see([image[: count % BATCH] for image in self._images])
        return count


def views(entry: SampleEntry, memory: Any) -> list[NDArray[np.uint16]]:
    """Return LR, HR and PAN of a span, whose arrays stand at the end of their members."""

    def view(span: ByteRange, size: tuple[int, ...]) -> NDArray[np.uint16]:
        values = int(np.prod(size))
        return np.frombuffer(memory, np.uint16, values, sum(span) - 2 * values).reshape(size)

    return [view(entry.members[f"{name}.npy"], size) for name, size in SIZES.items()]


def floor(place: Place, check: bool) -> Epoch:
    """Read each span into one buffer, scene after scene, and copy its windows: on two cores in two threads."""
    samples = place.index().samples("train")
    files = {shard.name: os.open(place.folder / "dataset" / shard.name, os.O_RDONLY) for shard, _ in samples}
    each = -(-len(samples) // place.cores)
    parts = [samples[first : first + each] for first in range(0, len(samples), each)]
    memory = [(bytearray(max(entry.size for _, entry in samples)), Gather()) for _ in parts]

    def run(part: int, see: See) -> int:
        buffer, gather = memory[part]

        def scenes() -> Iterator[Images]:
            for shard, entry in parts[part]:
                span = memoryview(buffer)[: entry.size]
                if os.preadv(files[shard.name], [span], entry.offset) != entry.size:
                    raise RuntimeError(f"{shard.name} was cut")
                if check and crc32(span) != entry.crc32:
                    raise RuntimeError(f"{entry.key} is damaged")
                yield views(entry, buffer)

        return gather(cut_all(scenes()), see)

    def epoch(_: int, see: See) -> int:
        with ThreadPoolExecutor(len(parts)) as pool:
            return sum(pool.map(partial(run, see=see), range(len(parts))))

    return epoch


def floor_mapped(place: Place) -> Epoch:
    """Copy the windows of each scene straight out of the mapped files, scene after scene, in one thread."""
    samples = place.index().samples("train")
    shards = {shard.name: shard for shard, _ in samples}
    mapped = {name: np.memmap(place.folder / "dataset" / name, np.uint8, "r") for name in shards}
    gather = Gather()
    scenes = [views(entry, mapped[shard.name][entry.offset :]) for shard, entry in samples]
    return lambda _, see: gather(cut_all(scenes), see)


def floor_in_order(place: Place, check: bool, huge: bool = False) -> Epoch:
    """Do the same in the loader's order: each span is read once, into memory that keeps it until its last chip.

    Args:
        place: Place of the dataset.
        check: Compare each span with its CRC-32.
        huge: Ask for huge pages, as the loader does.
    """
    config = DataConfig(uri=str(place.folder / "dataset"))
    dataset = ChipDataset(config.uri, "train", config)
    loader = TrainLoader(dataset, BatchPlan.create(BATCH, 0, 1), 0, 0)
    samples = dataset.index.samples("train")
    files = {shard.name: os.open(place.folder / "dataset" / shard.name, os.O_RDONLY) for shard, _ in samples}
    largest = max(entry.size for _, entry in samples)
    memory: Sequence[Any] = (
        np.empty((len(samples), largest), np.uint8) if huge else [bytearray(largest) for _ in samples]
    )
    gather = Gather()

    def chips(order: Iterable[int], held: dict[int, Images]) -> Iterator[Images]:
        for chip in order:
            scene, window = divmod(chip, CHIPS_PER_SCENE)
            if scene not in held:
                shard, entry = samples[scene]
                span = memoryview(memory[scene])[: entry.size]
                os.preadv(files[shard.name], [span], entry.offset)
                if check and crc32(span) != entry.crc32:
                    raise RuntimeError(f"{entry.key} is damaged")
                held[scene] = views(entry, memory[scene])
            yield cut(held[scene], window)

    return lambda number, see: gather(chips(loader.order(number).ravel().tolist(), {}), see)


def ours(place: Place, uri: str = "", *, evict: bool = False, turns: bool = False, **options: Any) -> Epoch:
    """Return the form that reads batches of the loader, with as many threads as cores unless ``options`` differ.

    Args:
        place: Place of the dataset.
        uri: URI of the dataset, if it is elsewhere.
        evict: Evict all scenes before each epoch, but keep their memory: the cost of a dataset larger than memory.
        turns: Turn, flip and convert to float, as in training; otherwise batches stay as they are stored.
        options: Options of the configuration.
    """
    settings = {"rotate_flip": turns, "loader_threads": place.cores, **options}
    config = DataConfig(uri=uri or str(place.folder / "dataset"), **settings)
    dataset = ChipDataset(config.uri, "train", config)
    loader = TrainLoader(dataset, BatchPlan.create(BATCH, 0, 1), 0, 0)

    if not turns:
        patch("pipeline.data.loader.to_batch", lambda stored, *_: stored).start()

    def epoch(number: int, see: See) -> int:
        if evict:
            forget(dataset.scenes)
        count = 0
        for batch in loader.batches(number):
            count += len(batch.lr)
            see((batch.lr, batch.hr, batch.pan))
        return count

    return epoch


def forget(scenes: SceneCache) -> None:
    """Evict all scenes; their memory is then free."""
    scenes._free.extend(cached.memory for cached in scenes._cached.values() if cached.memory is not None)
    scenes._cached.clear()


def ours_unchecked(place: Place) -> Epoch:
    """Make the loader skip its checks."""
    patch("pipeline.data.sample_reader.check_sample", lambda *_: None).start()
    return ours(place, evict=True)


def ours_cached(place: Place, evict: bool) -> Epoch:
    """Read from the node's disk cache, or fill it if it is empty."""
    return ours(place, evict=evict, cache_dir=str(place.cache))


class Chips(IterableDataset[Images]):
    """The chips of the samples that a peer yields."""

    def __init__(self, samples: Iterable[Mapping[str, Any]], suffix: str = "") -> None:
        self._samples = samples
        self._names = [f"{name}{suffix}" for name in SIZES]

    def __iter__(self) -> Iterator[Images]:
        return cut_all([sample[name] for name in self._names] for sample in self._samples)


def peer(place: Place, open_chips: Callable[[Place], Chips]) -> Epoch:
    """Gather a peer's chips here, or in torch's workers, which stack them into shared memory."""
    chips = open_chips(place)
    if place.workers:
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        loader: DataLoader[Images] = DataLoader(chips, BATCH, num_workers=place.workers, persistent_workers=True)

        def epoch(_: int, see: See) -> int:
            count = 0
            for batch in loader:
                count += len(batch[0])
                see(batch)
            return count

        return epoch
    gather = Gather()
    return lambda _, see: gather(chips, see)


def webdataset_chips(place: Place) -> Chips:
    """Decode the same shards by WebDataset, in their order."""
    import webdataset

    urls = [str(place.folder / "dataset" / shard.name) for shard in place.index().splits["train"]]
    return Chips(webdataset.WebDataset(urls, shardshuffle=False).decode(), ".npy")


def mosaicml_chips(place: Place, cold: bool) -> Chips:
    """Read MDS shards, first copied to a new folder if cold; in order, without hashes."""
    from streaming import StreamingDataset

    source = str(place.folder / "mds")
    where = {"remote": source, "local": str(place.cache)} if cold else {"local": source}
    return Chips(StreamingDataset(**where, shuffle=False, batch_size=4))


def litdata_chips(place: Place, cold: bool) -> Chips:
    """Read LitData's chunks, first copied to a new folder if cold; in order."""
    from litdata import StreamingDataset
    from litdata.streaming.resolver import Dir

    source = str(place.folder / "litdata")
    return Chips(StreamingDataset(Dir(path=str(place.cache), url=f"local:{source}") if cold else source))


def published(place: Place) -> Epoch:
    """Decode the rasters of each scene, resize them and cut: floats, as in the published loader."""
    import rasterio
    from torch.nn import functional

    from sharding.prepare.options import SampleOptions
    from sharding.sources.worldstrat.files import open_source
    from sharding.sources.worldstrat.layout import find_aois

    warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
    aois = find_aois(open_source(place.folder / "tree", "l2a"))[:PUBLISHED_SCENES]
    gather = Gather(np.float32)

    def read(path: str, bands: list[int], scale: float, size: int) -> NDArray[np.float32]:
        with rasterio.open(path) as raster:
            image = torch.from_numpy(raster.read(bands).astype(np.float32))[None] / scale
        resized = functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
        return resized[0].numpy()

    def scenes() -> Iterator[Images]:
        for aoi in aois:
            revisits = [each["L2A_data"] for each in list(aoi.candidates(SampleOptions()).values())[:8]]
            lr = np.stack([read(revisit.path, [4, 3, 2], 1, 160) for revisit in revisits])
            yield lr, read(aoi.hr["ps"].path, [1, 2, 3], 10000, 500), read(aoi.hr["pan"].path, [1], 10000, 500)

    return lambda _, see: gather(cut_all(scenes()), see)


def ranged_gets(place: Place) -> Epoch:
    """GET every span by boto3 alone, in parallel, and drop it."""
    import boto3
    from botocore.config import Config

    client = boto3.client("s3", config=Config(max_pool_connections=THREADS))
    parts = urlsplit(os.environ["LOADER_S3_URI"])
    samples = place.index().samples("train")

    def get(number: int) -> int:
        shard, entry = samples[number]
        key = f"{parts.path.strip('/')}/{shard.name}"
        span = f"bytes={entry.offset}-{entry.offset + entry.size - 1}"
        return len(client.get_object(Bucket=parts.netloc, Key=key, Range=span)["Body"].read())

    def epoch(_: int, see: See) -> int:
        with ThreadPoolExecutor(THREADS) as pool:
            if sum(pool.map(get, range(len(samples)))) != sum(entry.size for _, entry in samples):
                raise RuntimeError("ranges were cut")
        return CHIPS_PER_SCENE * len(samples)

    return epoch


def ours_s3(place: Place, *, evict: bool = False, cached: bool = False) -> Epoch:
    """Stream from S3 through memory that is empty at first.

    Args:
        place: Place of the disk cache.
        evict: Reuse the memory of the previous epoch.
        cached: Fill a disk cache too.
    """
    cache_dir = str(place.cache) if cached else ""
    return ours(place, os.environ["LOADER_S3_URI"], evict=evict, loader_threads=THREADS, cache_dir=cache_dir)
