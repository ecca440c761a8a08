"""The training loop: fit, epoch, step. Every process of the group calls `run_training`."""

from __future__ import annotations

import json
import logging
import math
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.registry import build_model
from pipeline.config import RunConfig
from pipeline.data import ChipDataset, TrainLoader
from pipeline.data.batches import Batch
from pipeline.engines.engine import compiled, use_tf32
from pipeline.engines.make import make_engine
from pipeline.order import BatchPlan, random_words
from pipeline.quality.losses import LossParts, fusion_loss
from pipeline.reporting.events import rank_folder
from pipeline.reporting.panels import num_panels
from pipeline.reporting.run_folder import RunFolder
from pipeline.reporting.run_logs import RunLogs
from pipeline.reporting.tags import AVERAGED, LOSS_TAGS
from pipeline.training.average import WeightAverage
from pipeline.training.checkpoint import (
    Checkpoint,
    Position,
    best_loss,
    discard_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from pipeline.training.initial import load_initial
from pipeline.training.profiling import StepProfiler
from pipeline.training.resume import CONFIG_FILE, claimed, find_checkpoint, order_state
from pipeline.training.schedule import learning_rate
from pipeline.training.step_values import StepRow, StepValues
from pipeline.training.validation import shown, validate
from pipeline.world import World, join_world
from sharding.errors import UserError
from sharding.progress import Progress, progress
from sharding.storage.lock import Lock

logger = logging.getLogger(__name__)

COUNTED = "counted chips"
"""Name of a step's value that is checked but not logged: the number of chips of the global batch that count."""
STOP = "stop"
"""Name of a step's value that is not logged: 1 on a rank that was asked to stop."""
Report = Callable[[Mapping[str, float]], None]


class NonFiniteLossError(UserError):
    """Training met a loss or gradient that is not finite."""


@dataclass(frozen=True)
class TrainResult:
    """Result of a finished training."""

    step: int
    """Optimizer steps taken in all."""
    best_loss: float | None
    """Least validation loss."""
    stopped: bool = False
    """Whether it was asked to stop before its last step; the checkpoint of its last step is complete."""


def run_training(config: RunConfig, report: Report | None = None, stop: threading.Event | None = None) -> TrainResult:
    """Train, or resume from the run folder's newest checkpoint; call it in every process of the group.

    Args:
        config: The run.
        report: Called on every rank with the validation metrics after each validation.
        stop: Event of this rank by which the training of all ranks ends at a checkpoint, within a few steps.

    Returns:
        The result, the same on every rank.

    Raises:
        UserError: The dataset, the run folder or the batch does not fit the configuration.
        NonFiniteLossError: The loss or the gradient is not finite.
    """
    if config.train.threads_per_rank:
        torch.set_num_threads(config.train.threads_per_rank)
    use_tf32(config.train.tf32)
    world = join_world()
    plan = BatchPlan.create(config.train.global_batch, config.train.micro_batch, world.size)
    train = ChipDataset(config.data.uri, "train", config.data)
    val = train.sibling("val")
    train.check_fits(config.model)
    run = RunFolder(config.output.uri, config.output.sync_seconds)
    # The last upload comes before the lock is released.
    with claimed(run, world) as lock, run:
        checkpoint = find_checkpoint(run, config, train, world)
        trainer = Trainer(config, world, plan, train, val, run, checkpoint, lock, stop)
        return trainer.fit(report or (lambda metrics: None))


class Trainer:
    """One run on one rank."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        plan: BatchPlan,
        train: ChipDataset,
        val: ChipDataset,
        run: RunFolder,
        checkpoint: Checkpoint | None,
        lock: Lock | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """Build network and engine, and restore the state of ``checkpoint``; rank 0 gets the run folder's lock."""
        self.lock = lock
        self.stop = stop or threading.Event()
        self.stopping = self.stopped = False
        self.config = config
        self.world = world
        self.plan = plan
        self.run = run
        self.train_set = train
        self.val_set = val
        self.loader = TrainLoader(train, plan, world.rank, config.train.seed, world.device)
        if checkpoint:
            order = order_state(checkpoint.config, checkpoint.position.index_digest)
            self.loader.load_state_dict({"step": checkpoint.state.step, "order": vars(order)})
        self.first_step = self.step + 1
        # From the kept weights, which a killed process may have found after its last full checkpoint.
        self.best_loss = best_loss(run.storage, checkpoint) if checkpoint else None
        self.total_steps = config.train.epochs * self.loader.steps_per_epoch
        if config.train.max_steps:
            self.total_steps = min(self.total_steps, config.train.max_steps)
        torch.manual_seed(config.train.seed)
        network = build_model(config.model)
        if config.train.init and not checkpoint:
            load_initial(network, config.train)
        if config.train.freeze:
            network.freeze(config.train.freeze)
        network.to(world.device)
        self.engine = make_engine(network, config.train, plan, world, checkpoint.state if checkpoint else None)
        self.average: WeightAverage | None = None
        if config.train.ema:
            kept = checkpoint.state.ema if checkpoint else {}
            self.average = WeightAverage(network, config.train.ema, kept)
        self.loss: Callable[..., LossParts] = fusion_loss
        if config.train.compile:
            self.loss = compiled(fusion_loss)
        self.values = StepValues(world, config.train.log_every)
        self._all_count = config.data.damaged == "stop"
        self._global_batch = torch.tensor(float(plan.global_batch), dtype=torch.float64, device=world.device)
        self.profiler = StepProfiler(run.local / rank_folder(world.rank), world.rank, config.train.profile)
        self._seed_generators(checkpoint)

    @property
    def step(self) -> int:
        """Return the optimizer steps taken or in progress: the global batches that the loader yielded."""
        return self.loader.step

    def fit(self, report: Report) -> TrainResult:
        """Train to the last step, validating after each epoch and at the end."""
        if self.step >= self.total_steps:
            logger.info("the run is complete at step %d: raise train.epochs or train.max_steps to continue", self.step)
            return TrainResult(self.step, self.best_loss)
        self._announce()
        logs = RunLogs(self.run, self.world, self.config.train, self.first_step)
        try:
            if self.config.train.init and self.step == 0:
                self.validate(logs)
            with progress(self.total_steps - self.step, "training", "step") if self.world.is_main else _Quiet() as bar:
                while self.step < self.total_steps and not self.stopped:
                    self.train_epoch(self.step // self.loader.steps_per_epoch, logs, bar, report)
        finally:
            self.profiler.close()
            logs.close()
        return TrainResult(self.step, self.best_loss, self.stopped)

    def train_epoch(self, epoch: int, logs: RunLogs, bar: Progress, report: Report) -> None:
        """Train the rest of ``epoch``, then validate."""
        shown: dict[str, str] = {}
        for batch in self.loader:
            self.train_step(batch, epoch)
            self.profiler.step()
            ends = self.step == self.total_steps
            validates = ends or self.step % self.loader.steps_per_epoch == 0
            self.stopped = self.stopping and not ends
            saves = ends or self.stopped or self.step % self.config.train.checkpoint_every == 0
            # Nothing is saved or validated before all losses up to here are known to be finite.
            row = None
            for row in self._arrived(everything=validates or saves):
                shown = {"loss": f"{row.by_rank['train/loss'].mean():.4g}"}
                if row.step < self.step:
                    logs.write_step(row.step, row.epoch, row.by_rank, {})
            metrics = self.validate(logs) if validates else {}
            if row is not None and row.step == self.step:
                logs.write_step(row.step, row.epoch, row.by_rank, metrics)
            if logs.wants_batches:
                in_epoch = (self.step - 1) % self.loader.steps_per_epoch
                logs.batch(self.step, epoch, self.loader.global_batch(epoch, in_epoch))
            if saves:
                self._save("step", self.config.train.keep_checkpoints)
            if metrics:
                report({"step": self.step, "epoch": epoch, **metrics})
            bar.update(1, **shown)
            if ends or self.stopped:
                return

    def train_step(self, batch: Batch, epoch: int) -> None:
        """Take one optimizer step on this rank's part of the global batch; its values arrive later (`_arrived`).

        At ZeRO 0 the host never waits for the device in this method.
        """
        began = time.perf_counter()
        rate = learning_rate(self.step, self.loader.steps_per_epoch, self.total_steps, self.config.train)
        self.engine.begin_step(self.step - 1)
        counted = self._counted(batch)
        sums = torch.zeros(len(LOSS_TAGS), dtype=torch.float64, device=self.world.device)
        for micro in batch.split(self.plan.micro_batch):
            parts = self.loss(self.engine.forward(micro), micro.hr, self.config.loss)
            logged = torch.stack([getattr(parts, field).detach() for field in LOSS_TAGS])
            sums += (logged * micro.weight).double().sum(dim=1)
            self.engine.backward(self._mean(parts.total, micro.weight, counted))
            self.engine.update(rate)
        if self.average:
            self.average.update(self.step)
        seconds = time.perf_counter() - began + self.loader.wait_seconds + self.values.wait_seconds
        # Scaled as if every rank had an equal share of the counted chips, so that the ranks' mean is the mean over
        # these.
        means = sums * (self.world.size / counted.clamp(min=1))
        losses = dict(zip(LOSS_TAGS.values(), means.unbind(), strict=True))
        measured = {COUNTED: counted, **losses, "train/grad_norm": self.engine.grad_norm}
        known = {
            STOP: float(self.stop.is_set()),
            "train/learning_rate": rate,
            "time/chips_per_second": self.plan.global_batch / seconds,
            "time/data_wait_seconds": self.loader.wait_seconds,
            "data/retries": self.train_set.storage.retries.total,
            "data/read_again": self.train_set.refetched,
            "data/quarantined_chips": self.loader.quarantined_chips,
            "store/retries": self.run.storage.retries.total,
        }
        self.values.put(self.step, epoch, measured, known)

    def _arrived(self, *, everything: bool) -> Iterator[StepRow]:
        """Yield the steps whose values have arrived (`StepValues.arrived`), by STEP_TAGS.

        Raises:
            NonFiniteLossError: On every rank, if any rank's loss or the gradient of a step is not finite.
            UserError: On every rank, if all chips of a step are quarantined.
        """
        for row in self.values.arrived(everything=everything):
            by_rank = {tag: values for tag, values in row.by_rank.items() if tag not in (COUNTED, STOP)}
            self.stopping |= bool(row.by_rank[STOP].any())
            if row.by_rank[COUNTED][0] == 0:
                raise UserError(
                    f"every chip of global batch {row.step} is quarantined: repair the dataset with `satfusion shard`,"
                    " which builds damaged shards again"
                )
            if not all(values.isfinite().all() for values in by_rank.values()):
                raise self._not_finite(row.step, row.epoch, by_rank)
            yield StepRow(row.step, row.epoch, by_rank)

    def _counted(self, batch: Batch) -> Tensor:
        """Return the number of chips of the global batch that count, a float64 scalar on the device."""
        if self._all_count:
            return self._global_batch
        return self.world.sum_over_ranks(batch.weight.double().sum())

    def _mean(self, losses: Tensor, weight: Tensor, counted: Tensor) -> Tensor:
        """Return a loss whose average over micro-batches and ranks, by the engine, is the mean of counted chips."""
        if self._all_count:
            return losses.mean()
        share = self.plan.grad_accum * self.world.size / counted.clamp(min=1)
        return ((losses * weight).sum() * share).to(losses.dtype)

    def _not_finite(self, step: int, epoch: int, by_rank: Mapping[str, Tensor]) -> NonFiniteLossError:
        what = "gradient" if by_rank["train/loss"].isfinite().all() else "loss"
        finite = torch.stack([values.isfinite() for values in by_rank.values()]).all(0)
        ranks = ", ".join(str(rank) for rank in (~finite).nonzero().flatten().tolist())
        chips = self.loader.global_batch(epoch, (step - 1) % self.loader.steps_per_epoch)
        self._discard_diverged(step)
        return NonFiniteLossError(
            f"{what} is not finite at step {step} on rank {ranks}; the global batch was {'; '.join(chips)}:"
            " look at these chips or lower train.learning_rate"
        )

    def _discard_diverged(self, step: int) -> None:
        """Remove the checkpoint of the step before: its update may have diverged, and a restart would repeat it."""
        if self.world.is_main:
            discard_checkpoint(self.run.storage, f"step-{step - 1}")

    def validate(self, logs: RunLogs) -> dict[str, float]:
        """Evaluate the validation split over all ranks; keep the weights if they are the best so far."""
        panels = num_panels(self.config.output, self.step, self.loader.steps_per_epoch, self.total_steps)
        found = validate(self.engine, self.val_set, self.world, self.config, panels)
        for chip, image in found.panels.items():
            logs.panel(self.step, f"val/{chip}", image)
        if not math.isfinite(found.metrics["val/loss"]):
            raise NonFiniteLossError(
                f"validation loss is not finite after step {self.step}: the weights diverged; lower train.learning_rate"
            )
        logs.validation(self.step, found.metrics, found.by_rank)
        if self.average:
            with self.average.applied():
                averaged = validate(self.engine, self.val_set, self.world, self.config, panels=0)
            logs.validation(self.step, averaged.metrics, averaged.by_rank, AVERAGED)
        if self.best_loss is None or found.metrics["val/loss"] < self.best_loss:
            self.best_loss = found.metrics["val/loss"]
            self._save("best", keep=1)
        if self.world.is_main:
            logger.info("step %d: validation %s", self.step, shown(found.metrics))
            if self.average:
                logger.info("step %d: with averaged weights %s", self.step, shown(averaged.metrics))
        return found.metrics

    def _save(self, kind: str, keep: int) -> None:
        state = self.engine.state(self.step, moments=kind == "step")
        if self.average:
            state = replace(state, ema=self.average.state())
        if self.lock:
            self.lock.check()
        # Logs of the steps before must be in the store before the checkpoint that follows them.
        self.run.sync()
        generators = self.world.gather_objects(_generators(self.world))
        if not self.world.is_main:
            return
        position = Position(self.step, self.best_loss, self.train_set.index.digest, self.world.size)
        name = f"{kind}-{self.step}"
        save_checkpoint(self.run.storage, name, self.config, position, state, generators)
        prune_checkpoints(self.run.storage, kind, self.step, keep)
        logger.info("checkpoint %s written", name)

    def _seed_generators(self, checkpoint: Checkpoint | None) -> None:
        # Dropout draws differ between ranks, and resume exactly with the same world size.
        if checkpoint and checkpoint.position.world_size == self.world.size:
            states = checkpoint.generators[self.world.rank]
            torch.set_rng_state(states["cpu"])
            if "cuda" in states and self.world.device.type == "cuda":
                torch.cuda.set_rng_state(states["cuda"])
            return
        word = random_words(1, self.config.train.seed, self.step, self.world.rank, "generator")[0]
        torch.manual_seed(int(word) >> 1)

    def _announce(self) -> None:
        if not self.world.is_main:
            return
        environment = {
            "world_size": self.world.size,
            "device": str(self.world.device.type),
            "threads_per_rank": torch.get_num_threads(),
            "micro_batch": self.plan.micro_batch,
            "grad_accum": self.plan.grad_accum,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "index_digest": self.train_set.index.digest,
        }
        record = self.config.to_dict() | {"environment": environment}
        self.run.storage.write(CONFIG_FILE, json.dumps(record, indent=1).encode())
        logger.info(
            "%d ranks, %d threads each, micro batch %d x %d accumulated; %d steps an epoch, %d chips of each epoch's"
            " tail dropped; %s step %d of %d",
            self.world.size,
            torch.get_num_threads(),
            self.plan.micro_batch,
            self.plan.grad_accum,
            self.loader.steps_per_epoch,
            self.loader.dropped_chips,
            "resuming after" if self.step else "starting at",
            self.step,
            self.total_steps,
        )


class _Quiet:
    """A silent progress bar, for ranks that show none."""

    def __enter__(self) -> _Quiet:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, n: int = 1, **fields: object) -> None:
        pass


def _generators(world: World) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states
