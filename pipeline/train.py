"""The training loop: fit, epoch, step. Every process of the group calls `run_training`."""

from __future__ import annotations

import json
import logging
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.registry import build_model
from pipeline.checkpoint import (
    Checkpoint,
    Position,
    best_loss,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from pipeline.config import RunConfig
from pipeline.data import Batch, ChipDataset, TrainLoader, evaluation_batches
from pipeline.engine import Engine, TrainState
from pipeline.logs import LOSS_TAGS, VAL_TAGS, RunLogs
from pipeline.losses import fusion_loss
from pipeline.metrics import image_metrics
from pipeline.order import BatchPlan, random_words
from pipeline.panels import panel
from pipeline.runfolder import RunFolder
from pipeline.schedule import learning_rate
from pipeline.world import World, join_world
from sharding.errors import UserError
from sharding.progress import Progress, progress

logger = logging.getLogger(__name__)

Report = Callable[[Mapping[str, float]], None]


class NonFiniteLossError(UserError):
    """Training met a loss or gradient that is no number."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished training came to."""

    step: int
    """Optimizer steps taken in all."""
    best_loss: float | None
    """Least validation loss."""
    resumed_from: int
    """Step this process went on from; 0 for a fresh start."""


def run_training(config: RunConfig, report: Report | None = None) -> TrainResult:
    """Train, or go on from the run folder's newest checkpoint; call it in every process of the group.

    Args:
        config: The run.
        report: Called on every rank with the validation metrics after each validation.

    Returns:
        What it came to, the same on every rank.

    Raises:
        UserError: The dataset, the run folder or the batch does not fit the configuration.
        NonFiniteLossError: The loss or the gradient stopped being a number.
    """
    if config.train.threads_per_rank:
        torch.set_num_threads(config.train.threads_per_rank)
    world = join_world()
    plan = BatchPlan.create(config.train.global_batch, config.train.micro_batch, world.size)
    train = ChipDataset(config.data.uri, "train", config.data)
    val = ChipDataset(config.data.uri, "val", config.data)
    _check_fit(config, train)
    with RunFolder(config.output.uri, config.output.sync_seconds) as run:
        checkpoint = _find_checkpoint(run, config, train, world)
        trainer = Trainer(config, world, plan, train, val, run, checkpoint)
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
    ) -> None:
        """Build network and engine, and stand where ``checkpoint`` stood."""
        self.config = config
        self.world = world
        self.plan = plan
        self.run = run
        self.train_set = train
        self.val_set = val
        self.loader = TrainLoader(train, plan, world.rank, config.train.seed, config.data)
        self.step = checkpoint.state.step if checkpoint else 0
        self.first_step = self.step + 1
        # Of the weights that are kept, which a killed process may have found after its last full checkpoint.
        self.best_loss = best_loss(run.storage) if checkpoint else None
        self.total_steps = config.train.epochs * self.loader.steps_per_epoch
        if config.train.max_steps:
            self.total_steps = min(self.total_steps, config.train.max_steps)
        torch.manual_seed(config.train.seed)
        network = build_model(config.model).to(world.device)
        self.engine = Engine(network, config.train, plan, world, checkpoint.state if checkpoint else None)
        self._seed_generators(checkpoint)

    def fit(self, report: Report) -> TrainResult:
        """Train to the last step, validating after each epoch and at the end."""
        resumed_from = self.step
        if self.step >= self.total_steps:
            logger.info("the run is complete at step %d: raise train.epochs or train.max_steps to go on", self.step)
            return TrainResult(self.step, self.best_loss, resumed_from)
        self._announce()
        logs = RunLogs(self.run, self.world, self.config.train, self.first_step)
        try:
            with progress(self.total_steps - self.step, "training", "step") if self.world.is_main else _Quiet() as bar:
                while self.step < self.total_steps:
                    self.train_epoch(self.step // self.loader.steps_per_epoch, logs, bar, report)
        finally:
            logs.close()
        return TrainResult(self.step, self.best_loss, resumed_from)

    def train_epoch(self, epoch: int, logs: RunLogs, bar: Progress, report: Report) -> None:
        """Train the rest of ``epoch``, then validate."""
        first = self.step % self.loader.steps_per_epoch
        for batch in self.loader.batches(epoch, first):
            values = self.train_step(batch, epoch)
            last_of_epoch = self.step % self.loader.steps_per_epoch == 0
            metrics: dict[str, float] = {}
            if last_of_epoch or self.step == self.total_steps:
                metrics = self.validate(logs)
            logs.step(self.step, epoch, values, metrics)
            if logs.wants_batches:
                in_epoch = (self.step - 1) % self.loader.steps_per_epoch
                logs.batch(self.step, epoch, self.loader.global_batch(epoch, in_epoch))
            if self.step % self.config.train.checkpoint_every == 0 or self.step == self.total_steps:
                self._save("step", self.config.train.keep_checkpoints)
            if metrics:
                report({"step": self.step, "epoch": epoch, **metrics})
            bar.update(loss=f"{values[:, 0].mean():.4g}")
            if self.step == self.total_steps:
                return

    def train_step(self, batch: Batch, epoch: int) -> Tensor:
        """Take one optimizer step on this rank's part of the global batch; return [ranks, STEP_TAGS] values."""
        began = time.perf_counter()
        rate = learning_rate(self.step + 1, self.loader.steps_per_epoch, self.total_steps, self.config.train)
        sums = torch.zeros(len(LOSS_TAGS), dtype=torch.float64, device=self.world.device)
        micro_batches = batch.to(self.world.device).split(self.plan.micro_batch)
        for number, micro in enumerate(micro_batches, 1):
            parts = fusion_loss(self.engine.forward(micro), micro.hr, self.config.loss)
            sums += torch.stack([part.detach().double().sum() for part in parts[: len(LOSS_TAGS)]])
            self.engine.backward(parts.total.mean())
            if number == len(micro_batches):
                self._stop_if_not_finite("loss", sums[0].item(), epoch)
            self.engine.step(rate)
        self.step += 1
        norm = self.engine.grad_norm
        self._stop_if_not_finite("gradient norm", norm, epoch)
        seconds = time.perf_counter() - began + self.loader.wait_seconds
        values = (sums / len(batch.chips)).tolist()
        speed = self.plan.global_batch / seconds
        return self.world.gather([*values, rate, norm, speed, self.loader.wait_seconds])

    def validate(self, logs: RunLogs) -> dict[str, float]:
        """Evaluate the validation split over all ranks; keep the weights if they are the best so far."""
        rows: dict[int, list[float]] = {}
        drawn = 0
        for batch, counts in evaluation_batches(self.val_set, self.world.rank, self.world.size):
            there = batch.to(self.world.device)
            fused = self.engine.predict(there)
            if not counts:
                continue
            chip = batch.chips[0]
            rows[chip] = evaluation_row(fused, there, self.config)
            if self.world.is_main and drawn < self.config.output.panels:
                logs.panel(self.step, f"val/{drawn}", panel(batch, fused, self.val_set.chip_id(chip)))
                drawn += 1
        metrics = self._merge_validation(rows, logs)
        if self.best_loss is None or metrics["val/loss"] < self.best_loss:
            self.best_loss = metrics["val/loss"]
            self._save("best", keep=1)
        if self.world.is_main:
            logger.info("step %d: validation %s", self.step, _shown(metrics))
        return metrics

    def _merge_validation(self, rows: Mapping[int, list[float]], logs: RunLogs) -> dict[str, float]:
        everyone: dict[int, list[float]] = {}
        for part in self.world.gather_objects(rows):
            assert isinstance(part, dict)
            everyone.update(part)
        # Summed in chip order, so that the figures do not depend on who computed which.
        table = torch.tensor([everyone[chip] for chip in sorted(everyone)], dtype=torch.float64)
        metrics = dict(zip(VAL_TAGS, table.mean(0).tolist(), strict=True))
        own = torch.tensor(list(rows.values()), dtype=torch.float64).reshape(-1, len(VAL_TAGS))
        logs.validation(self.step, metrics, self.world.gather(own.mean(0).tolist()))
        return metrics

    def _save(self, kind: str, keep: int) -> None:
        state = self.engine.state(self.step)
        if kind == "best":
            state = TrainState(state.weights, {}, state.step)
        generators = self.world.gather_objects(_generators(self.world))
        if not self.world.is_main:
            return
        position = Position(
            self.step,
            self.loader.steps_per_epoch,
            self.best_loss,
            self.train_set.index.digest,
            self.world.size,
        )
        name = f"{kind}-{self.step}"
        save_checkpoint(self.run.storage, name, self.config, position, state, generators)  # type: ignore[arg-type]
        prune_checkpoints(self.run.storage, kind, self.step, keep)
        logger.info("checkpoint %s written", name)

    def _stop_if_not_finite(self, what: str, value: float, epoch: int) -> None:
        by_rank = self.world.gather([value])[:, 0].tolist()
        if all(map(math.isfinite, by_rank)):
            return
        number = self.step + (what == "loss")
        chips = self.loader.global_batch(epoch, (number - 1) % self.loader.steps_per_epoch)
        ranks = ", ".join(str(rank) for rank, found in enumerate(by_rank) if not math.isfinite(found))
        raise NonFiniteLossError(
            f"{what} is not finite at step {number} on rank {ranks}; the global batch was {'; '.join(chips)}:"
            " look at these chips or lower train.learning_rate"
        )

    def _seed_generators(self, checkpoint: Checkpoint | None) -> None:
        # Dropout draws differ between ranks, and go on exactly where the same world stood.
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
        self.run.storage.write("config.json", json.dumps(record, indent=1).encode())
        logger.info(
            "%d ranks, %d threads each, micro batch %d x %d accumulated; %d steps an epoch, %d chips of each epoch's"
            " tail dropped; %s step %d of %d",
            self.world.size,
            torch.get_num_threads(),
            self.plan.micro_batch,
            self.plan.grad_accum,
            self.loader.steps_per_epoch,
            self.loader.dropped_chips,
            "going on after" if self.step else "starting at",
            self.step,
            self.total_steps,
        )


def evaluation_row(fused: Tensor, batch: Batch, config: RunConfig) -> list[float]:
    """Return the values of VAL_TAGS for a batch of one chip."""
    loss = fusion_loss(fused, batch.hr, config.loss).total
    metrics = image_metrics(fused, batch.hr, config.loss.registration)
    return [loss.item(), *(metrics[tag.removeprefix("val/")].item() for tag in VAL_TAGS[1:])]


class _Quiet:
    """Progress of the ranks that show none."""

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


def _shown(metrics: Mapping[str, float]) -> str:
    names = ("val/loss", "val/psnr", "val/psnr_adjusted", "val/ssim")
    return ", ".join(f"{name.removeprefix('val/')} {metrics[name]:.4g}" for name in names)


def _check_fit(config: RunConfig, dataset: ChipDataset) -> None:
    prepared = dataset.index.preparation
    bands, revisits = len(prepared["bands"]), int(prepared["revisits"])
    if bands != config.model.bands:
        raise UserError(
            f"model.bands = {config.model.bands}, but {config.data.uri} holds {bands} bands: set model.bands"
        )
    if revisits != config.model.revisits:
        raise UserError(
            f"model.revisits = {config.model.revisits}, but {config.data.uri} holds {revisits} revisits a sample:"
            f" set model.revisits={revisits} or shard again with --revisits {config.model.revisits}"
        )


def _find_checkpoint(run: RunFolder, config: RunConfig, dataset: ChipDataset, world: World) -> Checkpoint | None:
    """Return the checkpoint to go on from, refusing a run folder that holds another run."""
    checkpoint = newest_checkpoint(run.storage)
    # All ranks go on from what rank 0 found, or none does.
    name = world.broadcast_object(checkpoint.name if checkpoint else None)
    if name != (checkpoint.name if checkpoint else None):
        raise UserError(
            f"ranks see different checkpoints in {run.storage.uri}: the run folder must be shared by all nodes;"
            " use s3:// or a network file system"
        )
    if checkpoint is None:
        return None
    then, now = checkpoint.config, config
    fixed = {
        "model": (then.model, now.model),
        "train.seed": (then.train.seed, now.train.seed),
        "train.global_batch": (then.train.global_batch, now.train.global_batch),
        "data.shuffle_window": (then.data.shuffle_window, now.data.shuffle_window),
        "the dataset's index": (checkpoint.position.index_digest[:12], dataset.index.digest[:12]),
    }
    for what, (before, after) in fixed.items():
        if before != after:
            raise UserError(
                f"{run.storage.uri} holds a run with another {what} ({before}, now {after}):"
                " name another output.uri, or give the same configuration to go on"
            )
    logger.info("going on from %s/checkpoints/%s", run.storage.uri, name)
    return checkpoint
