"""One run of a sweep, trained, evaluated and recorded (``python -m cluster.sweep.cell FILE``)."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import msgspec

from cluster.logs import configure_logging
from pipeline.config import RunConfig
from pipeline.signals import STOPPED_STATUS, stop_on_sigterm
from pipeline.training.device_memory import out_of_memory
from sharding.errors import UserError
from sharding.files import read_text
from sharding.schema import Sha256, decode
from sharding.storage import NotFoundError, Storage, open_storage
from sharding.terminal import say

RESULT_FILE = "sweep.json"
"""File in the run folder, written last: a run that has it is done."""


class Result(msgspec.Struct):
    """Figures of a run that is done."""

    config: dict[str, dict[str, Any]]
    """Configuration of the run."""
    index_digest: Sha256
    """Digest of its dataset."""
    split: str
    """Split of the figures."""
    figures: dict[str, float | None]
    """Means over the split's chips by metric, of the best checkpoint; None for one that is not finite."""
    parameters: int
    """Trained parameters."""
    flops: int
    """Floating-point operations of a forward pass of one chip."""
    seconds: float
    """Time of the training steps, validations and restarts not counted."""
    baselines: dict[str, dict[str, float | None]] = {}
    """Figures of the methods that learn nothing, on the same chips."""

    def is_of(self, config: RunConfig, index_digest: str, split: str) -> bool:
        """Return True if these are the figures of this configuration on this dataset; new keys have their defaults.

        Raises:
            UserError: The recorded configuration is none of this version.
        """
        same = RunConfig.from_dict(self.config, RESULT_FILE) == config
        return same and (self.index_digest, self.split) == (index_digest, split)


def read_result(run: Storage) -> Result | None:
    """Return the figures of a run; None if it is not done.

    Raises:
        UserError: The file is damaged or of another program; or the store does not answer.
    """
    try:
        return decode(run.read(RESULT_FILE), Result)
    except NotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{run.uri}/{RESULT_FILE} holds no figures of a sweep ({error}): remove it, or name another output.uri"
        ) from None


def run_cell(
    values: Mapping[str, Any], split: str, stopping: Callable[[], AbstractContextManager[threading.Event]]
) -> bool:
    """Train a run to its end, evaluate its best checkpoint and record the figures; return False if it was stopped.

    Args:
        values: Configuration, `RunConfig.to_dict`.
        split: Split of the figures.
        stopping: Entered for the training, which ends at a checkpoint once the event is set.

    Raises:
        UserError: Like `run_training` and `evaluate_run`.
    """
    # Slow: they import torch and DeepSpeed.
    from models.cost import cost
    from pipeline.data import ChipDataset
    from pipeline.evaluation.baselines import BASELINES, PANSHARPENED
    from pipeline.evaluation.evaluate import EvaluateOptions, evaluate_run
    from pipeline.evaluation.result import FUSED
    from pipeline.training.loop import run_training
    from pipeline.world import leave_world

    config = RunConfig.from_dict(values)
    try:
        with stopping() as stop:
            if run_training(config, stop=stop).stopped:
                return False
    finally:
        leave_world()
    uri = config.output.uri
    found = evaluate_run(uri, split, "best", options=EvaluateOptions(panels=0))
    dataset = ChipDataset(config.data.uri, split, config.data)
    window = dataset.window(0)
    costs = cost(config.model, (window.size,) * 2, (window.hr_size,) * 2)
    run = open_storage(uri)
    result = Result(
        config=config.to_dict(),
        index_digest=dataset.index.digest,
        split=split,
        figures=_finite(found.means(FUSED)),
        parameters=costs.parameters,
        flops=costs.flops,
        seconds=training_seconds(run.read("metrics.csv").decode(), config.train.global_batch),
        baselines={name: _finite(found.means(name)) for name in (*BASELINES, *PANSHARPENED)},
    )
    run.write(RESULT_FILE, msgspec.json.format(msgspec.json.encode(result), indent=1))
    return True


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def training_seconds(metrics: str, global_batch: int) -> float:
    """Return the time of all steps of a run from the rates in its metrics.csv, over all of its restarts."""
    seconds, before = 0.0, 0
    for row in csv.DictReader(io.StringIO(metrics)):
        step, rate = int(row["step"]), float(row["time/chips_per_second"])
        seconds += (step - before) * global_batch / rate
        before = step
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cell in a file and return its exit status: 0, 1 without memory, 2 for a user error, 75 after SIGTERM."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    configure_logging()
    try:
        cell = json.loads(read_text("the cell's file", path))
        done = run_cell(cell["config"], cell["split"], stop_on_sigterm)
    except UserError as error:
        say(f"satfusion: error: {error}", sys.stderr)
        return 2
    except RuntimeError as error:
        if not (words := out_of_memory(error)):
            raise
        say(f"satfusion: error: the run {words}", sys.stderr)
        return 1
    return 0 if done else STOPPED_STATUS


if __name__ == "__main__":
    sys.exit(main())
