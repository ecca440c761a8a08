"""From an index to batches: scenes read by their span, cached as stored integers, cut to chips, one batch a step."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.registry import ModelConfig, check_sizes
from pipeline.chips import COLUMNS, LR_CHIP, Variant, Window, chip_window, cut, training_variant, turn_and_flip
from pipeline.config import DataConfig
from pipeline.order import (
    CHIPS_PER_SCENE,
    BatchPlan,
    Chips,
    epoch_chips,
    evaluation_slots,
    rank_slots,
    steps_per_epoch,
)
from pipeline.simulate import SIMULATORS, chip_generator
from sharding.errors import UserError
from sharding.schema import HR_BANDS, Index, Sample, SampleEntry, ShardEntry, read_sample
from sharding.storage import Storage, open_storage

logger = logging.getLogger(__name__)

EVALUATION_DRAW = (0, 0)
"""Seed and epoch of the revisits simulated for evaluation: every run and every evaluation sees the same."""


@dataclass(frozen=True)
class Batch:
    """Chips of one rank, ready for the network; images are float32 reflectances."""

    lr: Tensor
    """[B, R, C, h, w] low-resolution revisits."""
    pan: Tensor
    """[B, 1, H, W] panchromatic image."""
    hr: Tensor
    """[B, C, H, W] target."""
    revisit: Tensor
    """[B] int64, the revisit that a head alone is given."""
    chips: tuple[int, ...]
    """Chip numbers, 9 * sample + window."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(move(self.lr), move(self.pan), move(self.hr), move(self.revisit), self.chips)

    def split(self, size: int) -> list[Batch]:
        """Return consecutive micro-batches of ``size`` chips."""
        return [
            Batch(
                self.lr[first : first + size],
                self.pan[first : first + size],
                self.hr[first : first + size],
                self.revisit[first : first + size],
                self.chips[first : first + size],
            )
            for first in range(0, len(self.chips), size)
        ]


class SceneCache:
    """Decoded scenes by key, least recently used first out, within a bound of bytes; safe among threads.

    Two threads that want the same scene share one read.
    """

    def __init__(self, storage: Storage, limit_bytes: int) -> None:
        self._storage = storage
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._scenes: OrderedDict[str, Future[Sample]] = OrderedDict()
        self._bytes = 0

    def get(self, shard: ShardEntry, entry: SampleEntry) -> Sample:
        """Return a scene, reading it if it is not held.

        Raises:
            UserError: The store does not answer, or the scene's bytes are damaged.
        """
        with self._lock:
            future = self._scenes.get(entry.key)
            if future is not None:
                self._scenes.move_to_end(entry.key)
                owner = False
            else:
                future = self._scenes[entry.key] = Future()
                owner = True
        if owner:
            try:
                future.set_result(read_sample(self._storage, shard, entry))
            except BaseException as error:
                with self._lock:
                    del self._scenes[entry.key]
                future.set_exception(error)
                raise
            self._evict(future.result())
        return future.result()

    def _evict(self, added: Sample) -> None:
        with self._lock:
            self._bytes += _nbytes(added)
            for key in list(self._scenes):
                if self._bytes <= self._limit:
                    return
                if self._scenes[key].done():
                    self._bytes -= _nbytes(self._scenes.pop(key).result())


def _nbytes(sample: Sample) -> int:
    return sample.lr.nbytes + sample.clm.nbytes + sample.hr.nbytes + sample.pan.nbytes


class ChipDataset:
    """One split of a dataset, addressed by chip number."""

    def __init__(self, uri: str, split: str, config: DataConfig) -> None:
        """Open the index.

        Args:
            uri: Folder or s3:// prefix of the dataset.
            split: ``train``, ``val`` or ``test``.
            config: Cache bound, augmentation and simulation.

        Raises:
            UserError: No index there, or no such split.
        """
        if not uri:
            raise UserError("data.uri is empty: name a dataset written by `satfusion shard`, as data.uri=URI")
        self.storage = open_storage(uri)
        self.index = Index.load(self.storage)
        self._cache = SceneCache(self.storage, config.cache_mib << 20)
        self._config = config
        self.lr_size, hr_size = self._sizes()
        self.scale = hr_size / self.lr_size
        self.revisits = self.index.preparation.revisits
        self._step = self.index.preparation.step
        self._choose(split)

    def _sizes(self) -> tuple[int, int]:
        """Return the sides of both grids, on which nine chips must have room."""
        lr_size, hr_size = self.index.preparation.lr_size, self.index.preparation.hr_size
        needed = COLUMNS * LR_CHIP
        if lr_size is None or hr_size is None or lr_size < needed:
            given = "--native" if lr_size is None else f"--lr-size {lr_size}"
            raise UserError(
                f"{self.storage.uri} was sharded with {given}, and nine chips of {LR_CHIP} px need scenes of at least "
                f"{needed} px, all of one size: shard again with --lr-size {needed} or more"
            )
        return lr_size, hr_size

    def _choose(self, split: str) -> None:
        if split not in self.index.splits:
            raise UserError(f"{self.storage.uri} has no split {split!r}: it has {', '.join(self.index.splits)}")
        self.split = split
        self.shards = self.index.splits[split]
        self._places = self.index.samples(split)

    def sibling(self, split: str) -> ChipDataset:
        """Return another split of the same dataset, sharing index and cache.

        Raises:
            UserError: No such split.
        """
        other = copy.copy(self)
        other._choose(split)
        return other

    def check_fits(self, model: ModelConfig) -> None:
        """Refuse a model of other bands or revisits than the samples hold, or that cannot take the chips' sizes.

        Raises:
            UserError: It names both numbers, or the size.
        """
        uri, bands = self.storage.uri, len(self.index.preparation.bands)
        if bands != HR_BANDS:
            raise UserError(
                f"{uri} holds {bands} bands of its revisits and {HR_BANDS} of its targets, and a model returns the "
                "bands that it is given: shard again with --bands true_color"
            )
        if bands != model.bands:
            raise UserError(f"model.bands = {model.bands}, but {uri} holds {bands} bands: set model.bands={bands}")
        if self.revisits != model.revisits:
            raise UserError(
                f"model.revisits = {model.revisits}, but {uri} holds {self.revisits} revisits a sample:"
                f" set model.revisits={self.revisits} or shard again with --revisits {model.revisits}"
            )
        window = chip_window(0, self.scale)
        try:
            check_sizes(model, (window.size, window.size), (window.hr_size, window.hr_size))
        except ValueError as error:
            raise UserError(f"chips of {uri} do not fit: {error}") from None

    @property
    def simulation(self) -> str:
        """How revisits are made from the target, or ``off``."""
        return self._config.simulate

    @property
    def num_chips(self) -> int:
        """Chips of the split."""
        return len(self._places) * CHIPS_PER_SCENE

    def chip_id(self, chip: int) -> str:
        """Return the chip's name, ``AOI/0..8``."""
        return f"{self.aoi(chip)}/{chip % CHIPS_PER_SCENE}"

    def aoi(self, chip: int) -> str:
        """Return the name of the chip's AOI."""
        return self._places[chip // CHIPS_PER_SCENE][1].aoi

    def variant(self, chip: int, seed: int, epoch: int) -> Variant:
        """Return how training sees ``chip`` in ``epoch``."""
        return training_variant(
            chip,
            seed,
            epoch,
            lr_size=self.lr_size,
            scale=self.scale,
            revisits=self.revisits,
            windows=self._config.random_windows,
            turns=self._config.rotate_flip,
        )

    def evaluation_batch(self, chip: int) -> Batch:
        """Return ``chip`` as evaluation sees it: its own window, unturned, the clearest revisit for heads alone."""
        clearest = self._scene(chip).meta["clearest"]
        assert isinstance(clearest, int)
        unchanged = Variant(chip_window(chip, self.scale), 0, False, clearest)
        return collate([self._cut(chip, unchanged, *EVALUATION_DRAW)])

    def training_chip(self, chip: int, seed: int, epoch: int) -> Batch:
        """Return ``chip`` as training sees it in ``epoch``, a batch of one."""
        return self._cut(chip, self.variant(chip, seed, epoch), seed, epoch)

    def _scene(self, chip: int) -> Sample:
        return self._cache.get(*self._places[chip // CHIPS_PER_SCENE])

    def _cut(self, chip: int, variant: Variant, seed: int, epoch: int) -> Batch:
        scene = self._scene(chip)
        window: Window = variant.window

        def image(stored: npt.NDArray[np.uint16], y: int, x: int, size: int) -> Tensor:
            whole = torch.as_tensor(stored)
            part = cut(whole, y, x, size).to(torch.float32) * self._step
            return turn_and_flip(part, variant.quarter_turns, variant.flip)[None]

        hr = image(scene.hr, window.hr_y, window.hr_x, window.hr_size)
        if simulator := SIMULATORS.get(self._config.simulate):
            lr = simulator(hr[0], self.revisits, (window.size, window.size), chip_generator(seed, epoch, chip))[None]
        else:
            lr = image(scene.lr, window.y, window.x, window.size)
        return Batch(
            lr=lr,
            pan=image(scene.pan, window.hr_y, window.hr_x, window.hr_size),
            hr=hr,
            revisit=torch.tensor([variant.revisit]),
            chips=(chip,),
        )


def collate(batches: Sequence[Batch]) -> Batch:
    """Join batches along the first axis."""
    return Batch(
        lr=torch.cat([batch.lr for batch in batches]).contiguous(),
        pan=torch.cat([batch.pan for batch in batches]).contiguous(),
        hr=torch.cat([batch.hr for batch in batches]).contiguous(),
        revisit=torch.cat([batch.revisit for batch in batches]),
        chips=tuple(chip for batch in batches for chip in batch.chips),
    )


class TrainLoader:
    """Streams one rank's part of every global batch of an epoch, from any step on, prepared ahead by threads."""

    def __init__(self, dataset: ChipDataset, plan: BatchPlan, rank: int, seed: int, config: DataConfig) -> None:
        """Prepare to read.

        Raises:
            UserError: The split holds less than one global batch.
        """
        self.steps_per_epoch = steps_per_epoch(dataset.num_chips, plan.global_batch)
        if self.steps_per_epoch == 0:
            raise UserError(
                f"train.global_batch = {plan.global_batch} is more than the {dataset.num_chips} chips of"
                f" split {dataset.split!r}: set it to {dataset.num_chips} or less"
            )
        self.dropped_chips = dataset.num_chips - self.steps_per_epoch * plan.global_batch
        self.wait_seconds = 0.0
        self._dataset = dataset
        self._plan = plan
        self._rank = rank
        self._seed = seed
        self._config = config
        self._order: tuple[int, Chips] | None = None

    def order(self, epoch: int) -> Chips:
        """Return the chips of ``epoch`` in their order, for all ranks."""
        if self._order is None or self._order[0] != epoch:
            sizes = [len(shard.samples) for shard in self._dataset.shards]
            digest, window = self._dataset.index.digest, self._config.shuffle_window
            self._order = epoch, epoch_chips(sizes, digest, self._seed, epoch, window)
        return self._order[1]

    def global_batch(self, epoch: int, step_in_epoch: int) -> list[str]:
        """Return the names of the chips of a global batch, in slot order."""
        size = self._plan.global_batch
        slots = self.order(epoch)[step_in_epoch * size : (step_in_epoch + 1) * size]
        return [self._dataset.chip_id(int(chip)) for chip in slots]

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's batch for each step of ``epoch`` from ``first_step`` (0-based in the epoch) on.

        ``wait_seconds`` holds how long the last one was waited for.
        """
        order = self.order(epoch)

        def load(chip: int) -> Batch:
            return self._dataset.training_chip(chip, self._seed, epoch)

        with ThreadPoolExecutor(self._config.loader_threads, thread_name_prefix="loader") as pool:
            ahead: deque[list[Future[Batch]]] = deque()
            next_step = first_step
            try:
                for _ in range(first_step, self.steps_per_epoch):
                    while next_step < self.steps_per_epoch and len(ahead) < self._config.prefetch_batches:
                        slots = rank_slots(order, next_step, self._plan, self._rank)
                        ahead.append([pool.submit(load, int(chip)) for chip in slots])
                        next_step += 1
                    began = time.perf_counter()
                    batch = collate([future.result() for future in ahead.popleft()])
                    self.wait_seconds = time.perf_counter() - began
                    yield batch
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def evaluation_batches(dataset: ChipDataset, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Batch, bool]]:
    """Yield this rank's chips of a split one by one, each with whether it counts (see `evaluation_slots`)."""
    with ThreadPoolExecutor(1, thread_name_prefix="evaluation") as pool:
        slots = iter(evaluation_slots(dataset.num_chips, rank, world_size))
        ahead: deque[tuple[Future[Batch], bool]] = deque()
        try:
            for chip, counts in slots:
                ahead.append((pool.submit(dataset.evaluation_batch, chip), counts))
                if len(ahead) > 2:
                    future, ready = ahead.popleft()
                    yield future.result(), ready
            while ahead:
                future, ready = ahead.popleft()
                yield future.result(), ready
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
