"""Runs made of the real writers and values that a test names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from pipeline.config import RunConfig, TrainConfig
from pipeline.reporting.run_folder import CONFIG_FILE, RunFolder
from pipeline.reporting.run_logs import RunLogs
from pipeline.reporting.tags import STEP_TAGS, VAL_TAGS
from pipeline.world import World


def write_run(
    uri: str,
    steps: Sequence[int],
    loss: Mapping[int, Sequence[float]] | None = None,
    *,
    config: RunConfig | None = None,
    ranks: int = 1,
    retries: int = 0,
    psnr: float = 20.0,
    panel: bool = False,
) -> None:
    """Write a run's steps with the given losses of the ranks (default 1 / step), the last one validated.

    The time to wait for data is the rank's number; the retries are counted at the last step.
    """
    config = config or RunConfig()
    world = [World(rank, ranks, torch.device("cpu")) for rank in range(ranks)]
    run = RunFolder(uri, 1e9)
    with run:
        record = config.to_dict() | {"environment": {"world_size": ranks, "torch": "2.13.0", "index_digest": "d" * 64}}
        run.storage.write(CONFIG_FILE, json.dumps(record).encode())
        for place in world:
            logs = RunLogs(run, place, TrainConfig(), steps[0])
            for step in steps:
                by_rank = {tag: torch.zeros(ranks, dtype=torch.float64) for tag in STEP_TAGS}
                values = (loss or {}).get(step, [1 / step] * ranks)
                by_rank["train/loss"] = torch.tensor(list(values), dtype=torch.float64)
                by_rank["time/data_wait_seconds"] = torch.arange(ranks, dtype=torch.float64)
                by_rank["time/chips_per_second"] = torch.full((ranks,), 8.0, dtype=torch.float64)
                if step == steps[-1]:
                    by_rank["data/retries"] = torch.full((ranks,), float(retries), dtype=torch.float64)
                validation = dict.fromkeys(VAL_TAGS, psnr) if step == steps[-1] else {}
                if validation:
                    logs.validation(step, validation, torch.full((ranks, len(VAL_TAGS)), psnr, dtype=torch.float64))
                logs.write_step(step, 0, by_rank, validation)
            if panel:
                logs.panel(steps[-1], "val/0", np.zeros((8, 8, 3), np.uint8))
            logs.close()


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    """Return a configuration with another seed."""
    return replace(config, train=replace(config.train, seed=seed))
