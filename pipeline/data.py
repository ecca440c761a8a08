"""From an index to batches: scenes read by their span and held as stored, cut to chips, one batch a step."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import LifoQueue
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from models.registry import ModelConfig, check_sizes
from pipeline.batches import Batch, StoredBatch, to_batch
from pipeline.chips import COLUMNS, LR_CHIP, Layout, Variant, chip_window, training_draws, training_variant
from pipeline.config import DataConfig
from pipeline.diskcache import DiskCache
from pipeline.held import Cut, Whole, clearest
from pipeline.order import (
    CHIPS_PER_SCENE,
    BatchPlan,
    Chips,
    Shuffle,
    epoch_batches,
    evaluation_slots,
    rank_slots,
    steps_per_epoch,
)
from pipeline.readahead import ReadAhead
from pipeline.scenes import Scenes
from pipeline.spans import Spans
from sharding.errors import UserError
from sharding.schema import HR_BANDS, SPLITS, Index
from sharding.storage import open_storage

EVALUATION_DRAW = (0, 0)
"""Seed and epoch of the revisits simulated for evaluation: every run and every evaluation sees the same."""

CPU = torch.device("cpu")

T = TypeVar("T")


class ChipDataset(Dataset[Batch]):
    """One split of a dataset, addressed by chip number; also a map-style dataset of torch.

    ``dataset[chip]`` is the chip as evaluation sees it, a `Batch` of one; `pipeline.batches.collate` joins several.
    A copy that is pickled, as torch's worker processes get, reads and holds scenes by itself.
    """

    def __init__(self, uri: str, split: str, config: DataConfig) -> None:
        """Open the index.

        Args:
            uri: Folder or s3:// prefix of the dataset.
            split: ``train``, ``val`` or ``test``.
            config: Bounds of memory and disk, augmentation and simulation.

        Raises:
            UserError: No index there, no such split, or a folder for the cache that cannot be used.
        """
        if not uri:
            raise UserError("data.uri is empty: name a dataset written by `satfusion shard`, as data.uri=URI")
        self.storage = open_storage(uri)
        self.index = Index.load(self.storage)
        self.config = config
        self.lr_size, hr_size = self._sizes()
        self.scale = hr_size / self.lr_size
        self.revisits = self.index.preparation.revisits
        self._open_scenes()
        self._choose(split)

    def _open_scenes(self) -> None:
        config = self.config
        disk = DiskCache(Path(config.cache_dir), int(config.cache_dir_gib * 2**30)) if config.cache_dir else None
        largest = max((entry.size for split in SPLITS for _, entry in self.index.samples(split)), default=0)
        windows = [chip_window(chip, self.scale) for chip in range(CHIPS_PER_SCENE)]
        self.scenes = Scenes(
            Spans(self.storage, disk),
            Whole(largest) if config.random_windows else Cut(self.layout, windows, largest),
            config.cache_mib << 20,
            # A pool that trains, one that evaluates, and who asks for a chip by its number.
            2 * config.loader_threads + 1,
            quarantine=config.damaged == "quarantine",
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "scenes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_scenes()

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
        """Return another split of the same dataset, sharing index and scenes.

        Raises:
            UserError: No such split.
        """
        other = copy.copy(self)
        other.scenes = self.scenes
        other._choose(split)
        return other

    def check_fits(self, model: ModelConfig) -> None:
        """Refuse a model of other bands or revisits than the samples hold, or that cannot take the chips' sizes.

        Raises:
            UserError: It names both numbers, or the size.
        """
        uri, bands = self.storage.uri, len(self.index.preparation.band_numbers)
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
    def layout(self) -> Layout:
        """What a chip is."""
        preparation, window = self.index.preparation, chip_window(0, self.scale)
        return Layout(
            lr=(self.revisits, len(preparation.band_numbers), window.size, window.size),
            hr=(HR_BANDS, window.hr_size, window.hr_size),
            dtype=getattr(torch, preparation.dtype),
            step=preparation.step,
        )

    @property
    def simulation(self) -> str:
        """How revisits are made from the target, or ``off``."""
        return self.config.simulate

    @property
    def num_chips(self) -> int:
        """Chips of the split."""
        return len(self._places) * CHIPS_PER_SCENE

    @property
    def refetched(self) -> int:
        """Samples that this process read once more, because they were damaged."""
        return self.scenes.spans.refetched

    @property
    def quarantined_chips(self) -> int:
        """Chips, of all splits, that this process met damaged and left out."""
        return len(self.scenes.quarantined) * CHIPS_PER_SCENE

    def __len__(self) -> int:
        return self.num_chips

    def __getitem__(self, chip: int) -> Batch:
        if not -self.num_chips <= chip < self.num_chips:
            raise IndexError(f"chip {chip} of {self.num_chips}")
        return self.evaluation_batch(chip % self.num_chips)

    def chip_id(self, chip: int) -> str:
        """Return the chip's name, ``AOI/0..8``."""
        return f"{self.aoi(chip)}/{chip % CHIPS_PER_SCENE}"

    def aoi(self, chip: int) -> str:
        """Return the name of the chip's AOI."""
        return self._places[chip // CHIPS_PER_SCENE][1].aoi

    def variant(self, chip: int, draws: npt.NDArray[np.uint64]) -> Variant:
        """Return how training sees ``chip``; ``draws`` are the epoch's (`pipeline.chips.training_draws`)."""
        return training_variant(
            chip,
            draws[chip],
            lr_size=self.lr_size,
            scale=self.scale,
            revisits=self.revisits,
            windows=self.config.random_windows,
            turns=self.config.rotate_flip,
        )

    def evaluation_batch(self, chip: int, device: torch.device = CPU) -> Batch:
        """Return ``chip`` as evaluation sees it: its own window, unturned, the clearest revisit for heads alone."""
        stored = StoredBatch(self.layout, 1)
        with self.scenes.use(*self._places[chip // CHIPS_PER_SCENE]) as scene:
            revisit = clearest(scene) if scene else 0
            stored.begin([chip], [Variant(chip_window(chip, self.scale), 0, False, revisit)])
            stored.put(0, scene)
        return to_batch(stored, device, self.simulation, EVALUATION_DRAW)

    def training_chip(self, chip: int, seed: int, epoch: int) -> Batch:
        """Return ``chip`` as training sees it in ``epoch``, a batch of one."""
        stored = StoredBatch(self.layout, 1)
        self.gather([chip], [self.variant(chip, training_draws(self.num_chips, seed, epoch))], stored)
        return to_batch(stored, CPU, self.simulation, (seed, epoch))

    def gather(self, chips: Sequence[int], variants: Sequence[Variant], into: StoredBatch) -> None:
        """Cut chips out of their scenes, reading those that are not held."""
        into.begin(chips, variants)
        for slot, chip in enumerate(chips):
            with self.scenes.use(*self._places[chip // CHIPS_PER_SCENE]) as scene:
                into.put(slot, scene)

    def load(self, scenes: Sequence[int]) -> None:
        """Read scenes of one shard that will be used soon, in their order there."""
        shard, _ = self._places[scenes[0]]
        self.scenes.load(shard, [self._places[scene][1] for scene in scenes])

    def neighbourhood(self, scene: int) -> tuple[str, int]:
        """Return what a scene has in common with those that are worth reading by the same request."""
        shard, entry = self._places[scene]
        return shard.name, entry.offset // (self.scenes.spans.request_bytes or 1)


class TrainLoader:
    """One rank's part of every global batch, prepared ahead by threads, from any step on.

    Iterating yields the rest of the epoch and counts the steps; ``state_dict`` and ``load_state_dict`` carry the
    position, of which every rank has the same, over to any other world.
    """

    def __init__(
        self,
        dataset: ChipDataset,
        plan: BatchPlan,
        rank: int,
        seed: int,
        device: torch.device = CPU,
    ) -> None:
        """Prepare to read.

        Args:
            dataset: A split; its configuration says how it is shuffled, and what is prepared ahead by how many threads.
            plan: The global batch, and how many ranks share it.
            rank: Which of them this is.
            seed: Of order and augmentation.
            device: Where batches are wanted.

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
        """How long the last batch was waited for."""
        self.step = 0
        """Global batches that were taken, over all epochs."""
        self._dataset = dataset
        self._plan = plan
        self._rank = rank
        self._seed = seed
        self._config = dataset.config
        self._shuffle = Shuffle(dataset.config.shuffle_window, dataset.config.lanes)
        self._device = device
        # Copies to a GPU go beside its computing.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._order: tuple[int, Chips] | None = None
        # The last one given back is the next one taken: it may still be in the processor's cache.
        self._memory: LifoQueue[StoredBatch] = LifoQueue()

    def order(self, epoch: int) -> Chips:
        """Return the global batches [steps, global_batch] of ``epoch``."""
        if self._order is None or self._order[0] != epoch:
            sizes = [len(shard.samples) for shard in self._dataset.shards]
            digest = self._dataset.index.digest
            self._order = (
                epoch,
                epoch_batches(sizes, digest, self._seed, epoch, self._plan.global_batch, self._shuffle),
            )
        return self._order[1]

    def global_batch(self, epoch: int, step_in_epoch: int) -> list[str]:
        """Return the names of the chips of a global batch, in slot order."""
        return [self._dataset.chip_id(int(chip)) for chip in self.order(epoch)[step_in_epoch]]

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches from ``step`` to the end of its epoch; a batch that was yielded counts as taken."""
        epoch, first = divmod(self.step, self.steps_per_epoch)
        for batch in self.batches(epoch, first):
            self.step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what the order depends on; the same on every rank."""
        return {
            "step": self.step,
            "order": {
                "index digest": self._dataset.index.digest,
                "split": self._dataset.split,
                "seed": self._seed,
                "global batch": self._plan.global_batch,
                "shuffle window": self._shuffle.window,
                "lanes": self._shuffle.lanes,
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another loader stood, of any rank of any world.

        Raises:
            UserError: Its order was another; the difference is named.
        """
        own = self.state_dict()["order"]
        for what, value in state["order"].items():
            if own[what] != value:
                raise UserError(f"the state is of another {what}: {value}, and here it is {own[what]}")
        self.step = int(state["step"])

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's batch for each step of ``epoch`` from ``first_step`` (0-based in the epoch) on."""

        def finish(stored: StoredBatch) -> Batch:
            with torch.cuda.stream(self._stream):
                batch = to_batch(stored, self._device, self._dataset.simulation, (self._seed, epoch))
            if self._stream:
                # Here, in a thread of its own, so that the memory of the stored chips may be used again.
                self._stream.record_event().synchronize()
            return batch

        for batch in self._ahead(epoch, first_step, finish):
            if self._stream:
                for tensor in batch.tensors:
                    tensor.record_stream(torch.cuda.current_stream(self._device))
            yield batch

    def stored_batches(self, epoch: int, first_step: int = 0) -> Iterator[StoredBatch]:
        """Yield the same batches as they are stored, for those who convert by themselves.

        Each is good until the next is asked for.
        """
        return self._ahead(epoch, first_step, lambda stored: stored)

    def epoch_batches(self, epoch: int, first_step: int = 0) -> Dataset[Batch]:
        """Return the batches of ``batches`` as a map-style dataset, for torch's own loader and its processes.

        ``DataLoader(loader.epoch_batches(0), batch_size=None, num_workers=4)`` yields them in their order. Each worker
        process reads and holds scenes by itself, up to ``data.cache_mib``.
        """
        slots = rank_slots(self.order(epoch), self._plan, self._rank)[first_step:]
        return _EpochBatches(self._dataset, slots, self._seed, epoch)

    def _ahead(self, epoch: int, first_step: int, finish: Callable[[StoredBatch], T]) -> Iterator[T]:
        """Yield ``finish`` of each batch, called in threads that are ahead of whoever takes them."""
        slots = rank_slots(self.order(epoch), self._plan, self._rank)[first_step:]
        draws = training_draws(self._dataset.num_chips, self._seed, epoch)
        memory = self._memory
        # One that is taken, and those ahead.
        while memory.qsize() <= min(len(slots), self._config.prefetch_batches):
            memory.put(StoredBatch(self._dataset.layout, self._plan.per_rank, pin=self._stream is not None))

        def prepare(chips: list[int]) -> T:
            stored = memory.get()
            self._dataset.gather(chips, [self._dataset.variant(chip, draws) for chip in chips], stored)
            done = finish(stored)
            if done is not stored:
                memory.put(stored)
            return done

        with ThreadPoolExecutor(self._config.loader_threads, thread_name_prefix="loader") as pool:
            ahead: deque[Future[T]] = deque()
            scenes = ReadAhead(self._dataset, slots, pool)
            batches = iter(enumerate(slots.tolist()))
            try:
                for _ in range(len(slots)):
                    while len(ahead) < self._config.prefetch_batches and (coming := next(batches, None)) is not None:
                        number, chips = coming
                        scenes.need(number)
                        ahead.append(pool.submit(prepare, chips))
                        scenes.go_on()
                    began = time.perf_counter()
                    batch = ahead.popleft().result()
                    self.wait_seconds = time.perf_counter() - began
                    yield batch
                    if isinstance(batch, StoredBatch):
                        memory.put(batch)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


class _EpochBatches(Dataset[Batch]):
    """Batches by their number."""

    def __init__(self, dataset: ChipDataset, slots: Chips, seed: int, epoch: int) -> None:
        self._dataset, self._slots, self._draw = dataset, slots, (seed, epoch)
        self._draws = training_draws(dataset.num_chips, seed, epoch)

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, step: int) -> Batch:
        chips = self._slots[step].tolist()
        stored = StoredBatch(self._dataset.layout, len(chips))
        self._dataset.gather(chips, [self._dataset.variant(chip, self._draws) for chip in chips], stored)
        return to_batch(stored, CPU, self._dataset.simulation, self._draw)


def evaluation_batches(
    dataset: ChipDataset, rank: int = 0, world_size: int = 1, device: torch.device = CPU
) -> Iterator[tuple[Batch, bool]]:
    """Yield this rank's chips of a split one by one, each with whether it counts.

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
