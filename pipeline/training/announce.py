"""Start of a training: its configuration and environment, in the run folder and in the log."""

from __future__ import annotations

import json
import logging
import platform

import torch

from pipeline.config import RunConfig
from pipeline.data import TrainLoader
from pipeline.data.dataset import ChipDataset
from pipeline.order import BatchPlan
from pipeline.reporting.run_folder import CONFIG_FILE, RunFolder
from pipeline.world import World

logger = logging.getLogger(__name__)


def announce(
    config: RunConfig,
    run: RunFolder,
    world: World,
    plan: BatchPlan,
    loader: TrainLoader,
    dataset: ChipDataset,
    total_steps: int,
) -> None:
    """Write config.json, and log the arithmetic of the batch and of the epoch.

    Args:
        config: The run's resolved configuration.
        run: The run folder.
        world: The ranks.
        plan: Micro-batch and accumulation.
        loader: The loader of the training split.
        dataset: The training split.
        total_steps: Last optimizer step.
    """
    environment = {
        "world_size": world.size,
        "device": str(world.device.type),
        "threads_per_rank": torch.get_num_threads(),
        "micro_batch": plan.micro_batch,
        "grad_accum": plan.grad_accum,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "index_digest": dataset.index.digest,
    }
    run.storage.write(CONFIG_FILE, json.dumps(config.to_dict() | {"environment": environment}, indent=1).encode())
    logger.info(
        "%d ranks, %d threads each, micro batch %d x %d accumulated; %d steps an epoch, %d chips of each epoch's tail"
        " dropped; %s step %d of %d",
        world.size,
        torch.get_num_threads(),
        plan.micro_batch,
        plan.grad_accum,
        loader.steps_per_epoch,
        loader.dropped_chips,
        "resuming after" if loader.step else "starting at",
        loader.step,
        total_steps,
    )
