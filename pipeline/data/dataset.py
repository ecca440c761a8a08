"""One split of a dataset, addressed by chip number."""

from __future__ import annotations

import copy
import itertools
import logging
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from models.config import ModelConfig
from models.registry import check_sizes
from pipeline.config import DataConfig
from pipeline.data.batches import Batch, StoredBatch, to_batch
from pipeline.data.chips import ChipLayout, Variant, Window, chip_window, training_variant
from pipeline.data.disk_cache import DiskCache
from pipeline.data.mix import open_dataset
from pipeline.data.sample_reader import SampleReader
from pipeline.data.scene_cache import SceneCache
from pipeline.data.scene_layout import CutScenes, WholeScenes, clearest
from pipeline.order import evaluation_slots
from sharding.errors import UserError
from sharding.format.entries import SampleEntry, ShardEntry
from sharding.format.index import SPLITS
from sharding.format.layout import VALID, smallest

logger = logging.getLogger(__name__)

EVALUATION_DRAW = (0, 0)
"""Seed and epoch of the revisits simulated for evaluation: every run and every evaluation uses the same."""

CPU = torch.device("cpu")


class ChipDataset(Dataset[Batch]):
    """One split of a dataset, addressed by chip number; also a map-style dataset of torch.

    ``dataset[chip]`` is the chip as evaluation sees it, a `Batch` of one; `batches.collate` joins several. A pickled
    copy, such as a worker process of torch gets, has a scene cache of its own.
    """

    def __init__(self, uri: str | Sequence[str], split: str, config: DataConfig) -> None:
        """Open the index.

        Args:
            uri: Folder or s3:// prefix of the dataset, or a list of several (`pipeline.data.mix`).
            split: ``train``, ``val`` or ``test``.
            config: Memory and disk limits, augmentation and simulation.

        Raises:
            UserError: No index there, no such split, or a folder for the cache that cannot be used.
        """
        if not uri:
            raise UserError("data.uri is empty: name a dataset written by `satfusion shard`, as data.uri=URI")
        self._opened = open_dataset(uri, config.store_wait_seconds)
        self.storage, self.index = self._opened.storage, self._opened.index
        self.config = config
        self._refuse_repeats()
        self.grid = self.index.facts.chips
        self.lr_size, self.scale = self._sizes()
        self.revisits = config.simulated_revisits or self.index.preparation.revisits
        self._open_scenes()
        self._choose(split)

    def _open_scenes(self) -> None:
        config = self.config
        disk = DiskCache(Path(config.cache_dir), int(config.cache_dir_gib * 2**30)) if config.cache_dir else None
        largest = max((entry.size for split in SPLITS for _, entry in self.index.samples(split)), default=0)
        windows = [self.window(chip) for chip in range(self.chips_per_scene)]
        self.scenes = SceneCache(
            SampleReader(self.storage, disk),
            WholeScenes(largest, config.cloudy)
            if config.random_windows
            else CutScenes(self.layout, windows, largest, config.cloudy),
            config.cache_mib << 20,
            # Users of scenes: a pool for training, one for evaluation, and a caller that reads a chip by its number.
            2 * config.loader_threads + 1,
            quarantine=config.damaged == "quarantine",
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "scenes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_scenes()

    def _sizes(self) -> tuple[tuple[int, int], float]:
        """Return rows and columns of the LR grid that all samples have, and the HR pixels per LR pixel."""
        layouts = list({id(entry.layout): entry.layout for _, entry in self._all_samples()}.values())
        sides = smallest(layouts)
        if sides is None:
            raise UserError(
                f"{self.storage.uri} is an older dataset of --native, whose index does not tell the sizes of its "
                "samples: shard it again"
            )
        if self.index.facts.ratio is not None:
            high, low = self.index.facts.ratio
            return sides, high / low
        ratios = [
            high / low
            for layout in layouts
            for high, low in zip(layout["hr"].shape[-2:], layout["lr"].shape[-2:], strict=True)
            if high and low
        ]
        scale = statistics.median(ratios)
        lag = max(abs(ratio / scale - 1) for ratio in ratios) * self.grid.size / 2
        logger.info(
            "%s: the grids of samples have ratios from %.3f to %.3f: chips take %.3f, and are off by up to %.2f LR "
            "pixels at their edges",
            self.storage.uri,
            min(ratios),
            max(ratios),
            scale,
            lag,
        )
        return sides, scale

    def _all_samples(self) -> Iterator[tuple[ShardEntry, SampleEntry]]:
        return itertools.chain.from_iterable(self.index.samples(split) for split in SPLITS)

    def _refuse_repeats(self) -> None:
        """Refuse a dataset with an AOI that occurs twice, so that no split is scored on what another one trained."""
        if repeats := self.index.repeats:
            more = f" (and {len(repeats) - 1} more)" if len(repeats) > 1 else ""
            raise UserError(f"{self.storage.uri}: {repeats[0]}{more}: shard the dataset again")

    def _choose(self, split: str) -> None:
        if split not in self.index.splits:
            raise UserError(f"{self.storage.uri} has no split {split!r}: it has {', '.join(self.index.splits)}")
        self.split = split
        self.shards = self.index.splits[split]
        self.passes = self._opened.passes(self.shards)
        """Passes of an epoch over each shard; empty for one over all."""
        self._places = self.index.samples(split)
        if not self._places:
            raise UserError(
                f"split {split!r} of {self.storage.uri} is empty: shard the dataset again with AOIs for each split, or "
                "name another split"
            )

    def sibling(self, split: str) -> ChipDataset:
        """Return another split of the same dataset, sharing index and scenes.

        Raises:
            UserError: No such split.
        """
        other = copy.copy(self)
        other.scenes = self.scenes
        other._choose(split)
        return other

    def check_fits(self, model: ModelConfig) -> None:
        """Refuse a model that does not match the bands and revisits of the samples or cannot take the chips' sizes.

        Raises:
            UserError: The model does not fit; the message names both numbers, or the size.
        """
        uri, names = self.storage.uri, self.index.facts.bands
        bands = len(names.lr)
        if bands != len(names.hr):
            raise UserError(
                f"{uri} holds {bands} bands of its revisits and {len(names.hr)} of its targets, and a model returns "
                "the bands of its input: shard again with the same bands of both (WorldStrat: --bands true_color)"
            )
        if bands != model.bands:
            raise UserError(f"model.bands = {model.bands}, but {uri} holds {bands} bands: set model.bands={bands}")
        if self.revisits != model.revisits:
            raise UserError(
                f"model.revisits = {model.revisits}, but {uri} holds {self.revisits} revisits a sample:"
                f" set model.revisits={self.revisits} or shard again with --revisits {model.revisits}"
            )
        window = self.window(0)
        try:
            check_sizes(model, (window.size, window.size), (window.hr_size, window.hr_size))
        except ValueError as error:
            raise UserError(f"chips of {uri} do not fit: {error}") from None

    @property
    def layout(self) -> ChipLayout:
        """Return the layout of a chip in memory."""
        facts, window = self.index.facts, self.window(0)
        return ChipLayout(
            lr=(self.index.preparation.revisits, len(facts.bands.lr), window.size, window.size),
            hr=(len(facts.bands.hr), window.hr_size, window.hr_size),
            dtype=getattr(torch, self.index.preparation.dtype),
            unit=facts.radiometry.scale,
            offset=facts.radiometry.offset,
            native=facts.ratio is None,
            revisits=self.revisits,
            valid=VALID in facts.masks,
        )

    @property
    def chips_per_scene(self) -> int:
        """Return the number of chips of a scene."""
        return self.grid.count

    def window(self, chip: int) -> Window:
        """Return the window of a chip."""
        return chip_window(chip, self.scale, self.grid)

    @property
    def simulation(self) -> str:
        """Return the mode of simulating revisits from the target, or ``off``."""
        return self.config.simulate

    @property
    def num_chips(self) -> int:
        """Return the number of chips of the split."""
        return len(self._places) * self.chips_per_scene

    @property
    def num_aois(self) -> int:
        """Return the number of AOIs of the split."""
        return len(self._places)

    @property
    def refetched(self) -> int:
        """Return the number of samples that this process read a second time, because they were damaged."""
        return self.scenes.reader.refetched

    def __len__(self) -> int:
        return self.num_chips

    def __getitem__(self, chip: int) -> Batch:
        if not -self.num_chips <= chip < self.num_chips:
            raise IndexError(f"chip {chip} of {self.num_chips}")
        return self.evaluation_batch(chip % self.num_chips)

    def chip_id(self, chip: int) -> str:
        """Return the chip's name, ``AOI/<number of the chip in its scene>``."""
        return f"{self.aoi(chip)}/{chip % self.chips_per_scene}"

    def _place(self, chip: int) -> tuple[ShardEntry, SampleEntry]:
        """Return shard and sample of a chip; chips of further passes are numbered after those of the first."""
        return self._places[chip // self.chips_per_scene % len(self._places)]

    def aoi(self, chip: int) -> str:
        """Return the name of the chip's AOI."""
        return self._place(chip)[1].aoi

    def place(self, chip: int) -> str:
        """Return the AOI's name in its own dataset: in a mix, AOIs of one name are one place."""
        name = self.aoi(chip)
        return name.partition("/")[2] if self._opened.weights else name

    def agreement(self, chip: int) -> float | None:
        """Return the correlation of the revisits of the chip's AOI with its target; None if the index has none."""
        content = self._place(chip)[1].content
        return content.correlation if content else None

    def variant(self, chip: int, draws: npt.NDArray[np.uint64]) -> Variant:
        """Return the training variant of ``chip``; ``draws`` are the epoch's (`pipeline.data.chips.training_draws`)."""
        return training_variant(
            chip,
            draws[chip],
            lr_size=self.lr_size,
            scale=self.scale,
            revisits=self.revisits,
            windows=self.config.random_windows,
            turns=self.config.rotate_flip,
            grid=self.grid,
        )

    def evaluation_batch(self, chip: int, device: torch.device = CPU) -> Batch:
        """Return ``chip`` for evaluation: own window, not turned, the clearest revisit for heads without encoder.

        Simulated revisits are all of the target, and may be fewer than the stored ones: then it is their first.
        """
        stored = StoredBatch(self.layout, 1)
        with self.scenes.use(*self._place(chip)) as scene:
            window = self.window(chip)
            revisit = clearest(scene, window) if scene and self.simulation == "off" else 0
            stored.begin([chip], [Variant(window, 0, False, revisit)])
            stored.put(0, scene)
        return to_batch(stored, device, self.simulation, EVALUATION_DRAW)

    def crop(self, chips: Sequence[int], variants: Sequence[Variant], into: StoredBatch) -> None:
        """Crop chips out of their scenes; read scenes that are not cached."""
        into.begin(chips, variants)
        for slot, chip in enumerate(chips):
            with self.scenes.use(*self._place(chip)) as scene:
                into.put(slot, scene)

    @property
    def scene_capacity(self) -> int:
        """Return the number of scenes that fit in memory."""
        return self.scenes.capacity

    def prefetch(self, scenes: Sequence[int]) -> None:
        """Prefetch scenes of one shard, in their order in the shard."""
        found = [self._places[scene % len(self._places)] for scene in scenes]
        self.scenes.prefetch(found[0][0], [entry for _, entry in found])

    def neighbourhood(self, scene: int) -> tuple[str, int]:
        """Return the shard and the part of it that one request may read; equal for all scenes of that part."""
        shard, entry = self._places[scene % len(self._places)]
        return shard.name, entry.offset // (self.scenes.reader.request_bytes or 1)


def evaluation_batches(
    dataset: ChipDataset, rank: int = 0, world_size: int = 1, device: torch.device = CPU
) -> Iterator[tuple[Batch, bool]]:
    """Yield this rank's chips of a split one by one, each with a flag that tells if it counts.

    Over all ranks each chip counts once, unless it is quarantined (see `evaluation_slots`).
    """
    with ThreadPoolExecutor(dataset.config.loader_threads, thread_name_prefix="evaluation") as pool:
        slots = iter(evaluation_slots(dataset.num_chips, rank, world_size))
        ahead: deque[tuple[Future[Batch], bool]] = deque()
        try:
            while True:
                while len(ahead) <= dataset.config.loader_threads and (slot := next(slots, None)) is not None:
                    ahead.append((pool.submit(dataset.evaluation_batch, slot[0], device), slot[1]))
                if not ahead:
                    return
                future, counts = ahead.popleft()
                batch = future.result()
                yield batch, counts and bool(batch.weight[0])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
