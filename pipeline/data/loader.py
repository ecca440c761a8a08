"""Training batches of one rank, prepared ahead by threads: `TrainLoader`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from queue import LifoQueue
from typing import Any

import torch
from torch.utils.data import Dataset

from pipeline.data.batches import Batch, StoredBatch, to_batch
from pipeline.data.chips import training_draws
from pipeline.data.dataset import CPU, ChipDataset
from pipeline.data.prefetch import Prefetcher
from pipeline.order import BatchPlan, Chips, OrderState, Shuffle, epoch_batches, rank_slots, steps_per_epoch, stretches
from sharding.errors import UserError


class TrainLoader:
    """One rank's part of every global batch, prepared ahead by threads, starting at any step.

    Iterating yields the rest of the epoch and counts the steps. ``state_dict`` and ``load_state_dict`` save and restore
    the position, which is the same on every rank and fits any world size.
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
            dataset: A split; its configuration sets the shuffling, the number of batches prepared ahead and the
                threads.
            plan: The global batch and the number of ranks.
            rank: Number of this rank.
            seed: Seed of order and augmentation.
            device: Device of the batches.

        Raises:
            UserError: The split holds less than one global batch.
        """
        self._sizes = [len(shard.samples) for shard in dataset.shards]
        whole = stretches(self._sizes, dataset.chips_per_scene, dataset.passes)
        num_chips = sum(stretch.taken for stretch in whole)
        self._num_draws = max(stretch.first + stretch.chips for stretch in whole)
        self.steps_per_epoch = steps_per_epoch(num_chips, plan.global_batch)
        if self.steps_per_epoch == 0:
            raise UserError(
                f"train.global_batch = {plan.global_batch} is more than the {num_chips} chips of"
                f" split {dataset.split!r}: set it to {num_chips} or less"
            )
        self.dropped_chips = num_chips - self.steps_per_epoch * plan.global_batch
        self.quarantined_chips = 0
        """Quarantined chips, of weight 0, in the batches taken so far."""
        self.wait_seconds = 0.0
        """Wait for the last batch, seconds."""
        self.step = 0
        """Global batches taken, over all epochs."""
        self._dataset = dataset
        self._plan = plan
        self._rank = rank
        self._seed = seed
        self._config = dataset.config
        self._shuffle = Shuffle(dataset.config.shuffle_window, dataset.config.lanes)
        self._device = device
        # Copies to a GPU overlap its computation.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._order: tuple[int, Chips] | None = None
        self._order_state = OrderState(
            dataset.index.digest,
            dataset.split,
            seed,
            plan.global_batch,
            self._shuffle.window,
            self._shuffle.lanes,
            dataset.config.cloudy,
        )
        # Last in, first out: the memory returned last may still be in the processor's cache.
        self._memory: LifoQueue[StoredBatch] = LifoQueue()

    def order(self, epoch: int) -> Chips:
        """Return the global batches [steps, global_batch] of ``epoch``."""
        if self._order is None or self._order[0] != epoch:
            digest = self._dataset.index.digest
            self._order = (
                epoch,
                epoch_batches(
                    self._sizes,
                    digest,
                    self._seed,
                    epoch,
                    self._plan.global_batch,
                    self._shuffle,
                    self._dataset.chips_per_scene,
                    self._dataset.passes,
                ),
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
        """Return the position and the settings that the order depends on; the same on every rank."""
        return {
            "step": self.step,
            "order": vars(self._order_state),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume at the position of another loader, of any rank of any world.

        Raises:
            UserError: The other loader had a different order; the message names the difference.
        """
        for name, (before, now) in OrderState(**state["order"]).differences(self._order_state).items():
            what = name.replace("_", " ")
            raise UserError(f"the state is of another {what} ({before}, now {now}): resume with the same")
        self.step = int(state["step"])

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's batch for each step of ``epoch``, starting at ``first_step`` (0-based in the epoch)."""
        for batch in self._ahead(epoch, first_step):
            if self._stream:
                for tensor in batch.tensors:
                    tensor.record_stream(torch.cuda.current_stream(self._device))
            yield batch

    def epoch_batches(self, epoch: int, first_step: int = 0) -> Dataset[Batch]:
        """Return the batches of ``batches`` as a map-style dataset, for torch's own loader and its processes.

        ``DataLoader(loader.epoch_batches(0), batch_size=None, num_workers=4)`` yields them in their order. Each worker
        process has a scene cache of its own, of up to ``data.cache_mib``.
        """
        slots = rank_slots(self.order(epoch), self._plan, self._rank)[first_step:]
        return _EpochBatches(self._dataset, slots, self._num_draws, (self._seed, epoch))

    def _ahead(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """Yield each batch; threads prepare them ahead of the consumer."""
        slots = rank_slots(self.order(epoch), self._plan, self._rank)[first_step:]
        draws = training_draws(self._num_draws, self._seed, epoch)
        memory = self._memory
        # One for each batch that is prepared ahead.
        while memory.qsize() < min(len(slots), self._config.prefetch_batches):
            memory.put(StoredBatch(self._dataset.layout, self._plan.per_rank, pin=self._stream is not None))

        def prepare(chips: list[int]) -> tuple[Batch, int]:
            stored = memory.get()
            self._dataset.crop(chips, [self._dataset.variant(chip, draws) for chip in chips], stored)
            quarantined = int((stored.weight == 0).sum())
            with torch.cuda.stream(self._stream):
                batch = to_batch(stored, self._device, self._dataset.simulation, (self._seed, epoch))
            if self._stream:
                # In this thread, so that the memory of the stored chips can be reused.
                self._stream.record_event().synchronize()
            memory.put(stored)
            return batch, quarantined

        with ThreadPoolExecutor(self._config.loader_threads, thread_name_prefix="loader") as pool:
            ahead: deque[Future[tuple[Batch, int]]] = deque()
            scenes = Prefetcher(slots, self._dataset, pool, self._config.loader_threads)
            batches = iter(enumerate(slots.tolist()))
            try:
                for _ in range(len(slots)):
                    while len(ahead) < self._config.prefetch_batches and (coming := next(batches, None)) is not None:
                        number, chips = coming
                        scenes.need(number)
                        ahead.append(pool.submit(prepare, chips))
                        scenes.advance()
                    began = time.perf_counter()
                    batch, quarantined = ahead.popleft().result()
                    self.quarantined_chips += quarantined
                    self.wait_seconds = time.perf_counter() - began
                    yield batch
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


class _EpochBatches(Dataset[Batch]):
    """Batches by their number."""

    def __init__(self, dataset: ChipDataset, slots: Chips, num_draws: int, draw: tuple[int, int]) -> None:
        self._dataset, self._slots, self._draw = dataset, slots, draw
        self._draws = training_draws(num_draws, *draw)

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, step: int) -> Batch:
        chips = self._slots[step].tolist()
        stored = StoredBatch(self._dataset.layout, len(chips))
        self._dataset.crop(chips, [self._dataset.variant(chip, self._draws) for chip in chips], stored)
        return to_batch(stored, CPU, self._dataset.simulation, self._draw)
