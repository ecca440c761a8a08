"""The training loop: fit, epoch, step. Every process of the group calls `run_training`."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.registry import build_model
from pipeline.config import RunConfig
from pipeline.data import ChipDataset, TrainLoader
from pipeline.data.batches import Batch
from pipeline.engines.engine import arrival, compiled, use_tf32
from pipeline.engines.make import make_engine
from pipeline.order import BatchPlan
from pipeline.quality.losses import LossParts, fusion_loss
from pipeline.reporting.events import rank_folder
from pipeline.reporting.panels import num_panels
from pipeline.reporting.phases import Phases
from pipeline.reporting.run_folder import RunFolder
from pipeline.reporting.run_logs import RunLogs, open_logs
from pipeline.reporting.tags import AVERAGED, LOSS_TAGS
from pipeline.reporting.time_account import TimeAccount, shared_record
from pipeline.training.announce import announce
from pipeline.training.average import WeightAverage
from pipeline.training.checkpoint import Checkpoint, Position, best_kept, discard_diverged
from pipeline.training.initial import load_initial
from pipeline.training.profiling import StepProfiler
from pipeline.training.resume import claimed, find_checkpoint, order_state, seed_generators
from pipeline.training.saving import Saver, Snapshot, generator_states
from pipeline.training.schedule import learning_rate
from pipeline.training.step_values import StepRow, StepValues
from pipeline.training.validation import validate
from pipeline.training.watchdog import Watchdog
from pipeline.world import Channel, World, join_world
from sharding.errors import UserError
from sharding.progress import Progress, progress
from sharding.storage.lock import Lock

logger = logging.getLogger(__name__)

COUNTED = "counted chips"
"""Name of a step's value that is checked but not logged: the number of chips of the global batch that count."""
ASKED = SAVE, STOP, FAILED = "save", "stop", "failed"
"""Names of values that are 1 where a rank asks all ranks to save a checkpoint, to stop after one, or to meet the error
of one that was not written: all ranks read them at the same step."""
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
    phases = Phases()
    world = join_world()
    plan = BatchPlan.create(config.train.global_batch, config.train.micro_batch, world.size)
    with Watchdog(phases, world, Channel(world), config.train):
        train = ChipDataset(config.data.uri, "train", config.data)
        val = train.sibling("val")
        train.check_fits(config.model)
        run = RunFolder(config.output.uri, config.output.sync_seconds, config.data.store_wait_seconds)
        phases.count_retries(train.storage.retries, run.storage.retries)
        # The last upload comes before the lock is released.
        with claimed(run, world) as lock, run:
            checkpoint = find_checkpoint(run, config, train, world)
            trainer = Trainer(config, world, plan, train, val, run, checkpoint, lock, phases, stop)
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
        phases: Phases | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """Build network and engine, and restore the state of ``checkpoint``; rank 0 gets the run folder's lock."""
        self.phases = phases or Phases()
        self.stop, self.stopped = stop or threading.Event(), False
        self.saver = Saver(run, world, config, Channel(world), lock)
        self._saved_at, self._stalled = time.monotonic(), 0.0
        self._asked: set[str] = set()
        self._rows: list[StepRow] = []
        self.config, self.world, self.plan, self.run = config, world, plan, run
        self.train_set, self.val_set = train, val
        self.loader = TrainLoader(train, plan, world.rank, config.train.seed, world.device)
        if checkpoint:
            order = order_state(checkpoint.config, checkpoint.position.index_digest)
            self.loader.load_state_dict({"step": checkpoint.state.step, "order": vars(order)})
        self.first_step = self.step + 1
        # From the kept weights, which a killed process may have found after its last full checkpoint.
        kept_best = best_kept(run.storage, checkpoint) if world.is_main else (None, None)
        self.best_loss, self._best_step = world.gather_objects(kept_best)[0]
        self.account = TimeAccount(self.phases.spent, shared_record(run.storage, world), self.step)
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
        state = checkpoint.state if checkpoint else None
        self.engine = make_engine(network, config.train, plan, world, state, config.deepspeed)
        self.average: WeightAverage | None = None
        if config.train.ema:
            kept = checkpoint.state.ema if checkpoint else {}
            self.average = WeightAverage(network, config.train.ema, kept)
        self.loss: Callable[..., LossParts] = compiled(fusion_loss) if config.train.compile else fusion_loss
        self.values = StepValues(world, config.train.log_every)
        self._all_count = config.data.damaged == "stop" and not train.layout.valid
        self._global_batch = torch.tensor(float(plan.global_batch), dtype=torch.float64, device=world.device)
        self.profiler = StepProfiler(run.local / rank_folder(world.rank), world.rank, config.train.profile)
        seed_generators(checkpoint, world, config.train.seed, self.step)

    @property
    def step(self) -> int:
        """Return the optimizer steps taken or in progress: the global batches that the loader yielded."""
        return self.loader.step

    def fit(self, report: Report) -> TrainResult:
        """Train to the last step, validating after each epoch and at the end."""
        if self.step >= self.total_steps:
            logger.info("the run is complete at step %d: raise train.epochs or train.max_steps to continue", self.step)
            return TrainResult(self.step, self.best_loss)
        if any(self.world.gather_objects(self.stop.is_set())):
            return TrainResult(self.step, self.best_loss, stopped=True)
        if self.world.is_main:
            announce(self.config, self.run, self.world, self.plan, self.loader, self.train_set, self.total_steps)
            self.account.begin(self.run)
        logs = open_logs(self.run, self.world, self.config, self.first_step)
        try:
            if self.config.train.init and self.step == 0 and self._is_best(self.validate(logs)):
                self._save(best=True, full=False)
            with progress(self.total_steps - self.step, "training", "step", shown=self.world.is_main) as bar:
                while self.step < self.total_steps and not self.stopped:
                    self.train_epoch(self.step // self.loader.steps_per_epoch, logs, bar, report)
            self._settle()
            if self.world.is_main:
                self.account.record(self.run, due=True, complete=not self.stopped)
                logger.info("%s", self.account.summary())
        except NonFiniteLossError as error:
            for row in self._rows:
                logs.write_step(row.step, row.epoch, row.by_rank, {})
            logs.alert(self.step, str(error))
            raise
        finally:
            self.profiler.close()
            self.saver.close()
            logs.close()
        return TrainResult(self.step, self.best_loss, self.stopped)

    def train_epoch(self, epoch: int, logs: RunLogs, bar: Progress, report: Report) -> None:
        """Train the rest of ``epoch``, then validate."""
        shown: dict[str, str] = {}
        self.phases.enter("data", self.step)
        for batch in self.loader:
            self.phases.enter("first step" if self._compiles() else "step", self.step)
            self.train_step(batch, epoch)
            self.profiler.step()
            ends = self.step == self.total_steps
            validates = ends or self.step % self.loader.steps_per_epoch == 0
            saves = ends or self.step % self.config.train.checkpoint_every == 0
            # Nothing is saved or validated before all losses up to here are known to be finite.
            rows = self._rows = []
            rows.extend(self._arrived(everything=validates or saves))
            if self._asked:
                rows.extend(self._arrived(everything=True))
                saves = True
            if FAILED in self._asked:
                self._settle()
            self.stopped = STOP in self._asked and not ends
            self.account.count(self.step)
            metrics = self.validate(logs) if validates else {}
            self._log(logs, epoch, rows, metrics)
            best = self._is_best(metrics)
            if best or saves:
                self._save(best=best, full=saves)
            elif self.world.is_main:
                self.account.record(self.run)
            if metrics:
                report({"step": self.step, "epoch": epoch, **metrics})
            if rows:
                shown["loss"] = f"{rows[-1].by_rank['train/loss'].mean():.4g}"
            bar.update(1, **shown)
            self.phases.enter("data", self.step)
            if ends or self.stopped:
                return

    def _log(self, logs: RunLogs, epoch: int, rows: Sequence[StepRow], metrics: Mapping[str, float]) -> None:
        """Log the steps that have arrived, the current one with the metrics of its validation."""
        for row in rows:
            logs.write_step(row.step, row.epoch, row.by_rank, metrics if row.step == self.step else {})
        if logs.wants_batches:
            in_epoch = (self.step - 1) % self.loader.steps_per_epoch
            logs.batch(self.step, epoch, self.loader.global_batch(epoch, in_epoch))

    def _compiles(self) -> bool:
        """Return whether the current step may compile: the first, and the first after ARConv's kernels are frozen."""
        return self.step in {self.first_step, self.config.model.kernel_freeze_step + 1}

    def train_step(self, batch: Batch, epoch: int) -> None:
        """Take one optimizer step on this rank's part of the global batch; its values arrive later (`_arrived`).

        At ZeRO 0 the host never waits for the device in this method.
        """
        began = time.perf_counter()
        rate = learning_rate(self.step, self.loader.steps_per_epoch, self.total_steps, self.config.train)
        self.engine.begin_step(self.step - 1)
        counted = self._counted(batch)
        tags = {field: tag for field, tag in LOSS_TAGS.items() if field in self.config.loss.measured}
        sums = torch.zeros(len(tags), dtype=torch.float64, device=self.world.device)
        for micro in batch.split(self.plan.micro_batch):
            parts = self.loss(self.engine.forward(micro), micro.hr, self.config.loss, micro.valid, micro.lr)
            logged = torch.stack([getattr(parts, field).detach() for field in tags])
            sums += (logged * micro.weight).double().sum(dim=1)
            self.engine.backward(self._mean(parts.total, micro.weight, counted))
            self.engine.update(rate)
            self.phases.progressed()
        if self.average:
            self.average.update(self.step)
        seconds = time.perf_counter() - began + self.loader.wait_seconds + self.values.wait_seconds
        # Scaled as if every rank had an equal share of the counted chips: the ranks' mean is the mean over these.
        means = sums * (self.world.size / counted.clamp(min=1))
        losses = dict(zip(tags.values(), means.unbind(), strict=True))
        measured = {COUNTED: counted, **losses, "train/grad_norm": self.engine.grad_norm}
        due = self.config.train.checkpoint_seconds
        known = {
            SAVE: float(self.world.is_main and 0 < due <= time.monotonic() - self._saved_at),
            STOP: float(self.stop.is_set()),
            FAILED: float(self.saver.failed),
            "train/learning_rate": rate,
            "time/chips_per_second": self.plan.global_batch / seconds,
            "time/data_wait_seconds": self.loader.wait_seconds,
            "time/effective": self.account.effective,
            "time/checkpoint_stall_seconds": self._stalled,
            "data/retries": self.train_set.storage.retries.total,
            "data/read_again": self.train_set.refetched,
            "data/quarantined_chips": self.loader.quarantined_chips,
            "store/retries": self.run.storage.retries.total,
            "store/checkpoint_seconds": self.saver.seconds,
        }
        self._stalled = 0.0
        self.values.put(self.step, epoch, measured, known)

    def _arrived(self, *, everything: bool) -> Iterator[StepRow]:
        """Yield the steps whose values have arrived (`StepValues.arrived`), by STEP_TAGS.

        Raises:
            NonFiniteLossError: On every rank, if any rank's loss or the gradient of a step is not finite.
            UserError: On every rank, if all chips of a step are quarantined.
        """
        for row in self.values.arrived(everything=everything):
            by_rank = {tag: values for tag, values in row.by_rank.items() if tag not in (COUNTED, *ASKED)}
            self._asked.update(name for name in ASKED if row.by_rank[name].any())
            if row.by_rank[COUNTED][0] == 0:
                raise UserError(
                    f"every chip of global batch {row.step} is quarantined or without data: repair the dataset with"
                    " `satfusion shard`, which builds damaged shards again, or leave out samples by its --max-nodata"
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
        if self.world.is_main:
            # The update of the step before may have diverged, and a restart from its checkpoint would repeat it.
            self.saver.wait()
            discard_diverged(self.run.storage, step - 1)
        return NonFiniteLossError(
            f"{what} is not finite at step {step} on rank {ranks}; the global batch was {'; '.join(chips)}:"
            " look at these chips or lower train.learning_rate"
        )

    def validate(self, logs: RunLogs) -> dict[str, float]:
        """Evaluate the validation split over all ranks."""
        self.phases.enter("validation", self.step)
        alive = self.phases.progressed
        panels = num_panels(self.config.output, self.step, self.loader.steps_per_epoch, self.total_steps)
        found = validate(self.engine, self.val_set, self.world, self.config, panels, alive)
        for chip, image in found.panels.items():
            logs.panel(self.step, f"val/{chip}", image)
        if not math.isfinite(found.metrics["val/loss"]):
            raise NonFiniteLossError(
                f"validation loss is not finite after step {self.step}: the weights diverged; lower train.learning_rate"
            )
        logs.validation(self.step, found.metrics, found.by_rank)
        if self.average:
            with self.average.applied():
                averaged = validate(self.engine, self.val_set, self.world, self.config, 0, alive)
            logs.validation(self.step, averaged.metrics, averaged.by_rank, AVERAGED)
        if self.world.is_main:
            logger.info("step %d: validation %s", self.step, found)
            if self.average:
                logger.info("step %d: with averaged weights %s", self.step, averaged)
        return found.metrics

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        """Return whether the weights are the best so far, and note it; False without a validation.

        Best weights that are kept of this very step, before a restart, stay: rewriting them would risk them.
        """
        if not metrics or self.step == self._best_step:
            return False
        if self.best_loss is not None and metrics["val/loss"] >= self.best_loss:
            return False
        self.best_loss, self._best_step = metrics["val/loss"], self.step
        return True

    def _save(self, *, best: bool, full: bool) -> None:
        """Copy the state and hand it to the saver; wait only if the checkpoint before is still being written."""
        began = time.perf_counter()
        self.phases.enter("store", self.step)
        failure = self.saver.wait()
        self.phases.enter("checkpoint", self.step)
        self.world.raise_together(failure)
        if self.world.is_main:
            self.account.record(self.run, due=True)
        state = self.engine.state(self.step, moments=full, keep=self.world.is_main)
        if self.average and self.world.is_main:
            state = replace(state, ema=self.average.state(), arrived=arrival(self.world.device))
        generators = self.world.gather_objects(generator_states(self.world))
        self._saved_at = time.monotonic()
        self._asked.clear()
        position = Position(self.step, self.best_loss, self.train_set.index.digest, self.world.size)
        self._stalled = time.perf_counter() - began
        self.saver.submit(Snapshot(best, full, position, state, generators, began, self._stalled))

    def _settle(self) -> None:
        """Wait for the last checkpoint; if a rank could not write its part, raise its error on every rank."""
        self.phases.enter("store", self.step)
        self.world.raise_together(self.saver.wait())
