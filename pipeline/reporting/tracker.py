"""Scalars of a run at an experiment tracker: W&B or MLflow, where the package is installed and `output.tracker` asks.

Where the tracker is, and the key that opens it, are settings of rank 0's environment (WANDB_*, MLFLOW_*), and no part of
a configuration. The run's id there is kept in the run folder, so a restart continues the same run.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from pipeline.config import RunConfig
from pipeline.world import World
from sharding.errors import UserError
from sharding.schema import decode
from sharding.storage import NotFoundError, Storage

if TYPE_CHECKING:
    from concurrent.futures import Future

logger = logging.getLogger(__name__)

ID_FILE = "tracker.json"
"""File in the run folder with the ids of the run, by tracker."""
PROJECT = "satfusion"
"""Project of W&B and experiment of MLflow, unless the environment names another."""


class Tracker(Protocol):
    """Run at a tracker; what fails after its start is logged and stops no training."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send scalars of a step, without waiting for the tracker."""

    def close(self) -> None:
        """Wait for what is being sent, and end the run."""


def open_tracker(config: RunConfig, run: Storage, world: World) -> Tracker | None:
    """Open the run at the tracker that ``output.tracker`` names, on rank 0; None on other ranks and without a name.

    Raises:
        UserError: On every rank: the package is not installed, or the tracker cannot be used.
    """
    name = config.output.tracker
    if not name:
        return None
    opened: Tracker | None = None
    failure: UserError | None = None
    if world.is_main:
        try:
            opened = _open(name, config, run)
        except UserError as error:
            failure = error
    world.raise_together(failure)
    return opened


def _open(name: str, config: RunConfig, run: Storage) -> Tracker:
    package, make = _TRACKERS[name]
    ids = _read_ids(run)
    try:
        tracker, ids[name] = make(config, run.uri, ids.get(name))
    except ImportError:
        raise UserError(
            f"output.tracker = '{name}' needs the package {package}, which is not installed on rank 0's machine: "
            f"`pip install {package}`, or leave the key out"
        ) from None
    run.write(ID_FILE, msgspec.json.encode(ids))
    return tracker


def _read_ids(run: Storage) -> dict[str, str]:
    try:
        return decode(run.read(ID_FILE), dict[str, str])
    except NotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{run.uri}/{ID_FILE} holds no ids of trackers ({error}): remove it") from None


def _flat(config: RunConfig) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in config.to_dict().items() for key, value in keys.items()}


class _Wandb:
    """Run of Weights & Biases; its own process sends, and stores under WANDB_DIR if WANDB_MODE is offline."""

    def __init__(self, config: RunConfig, uri: str, known: str | None) -> None:
        import wandb  # an optional package

        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, disable_job_creation=True
        )
        # A question at a terminal would stop all ranks.
        os.environ.setdefault("WANDB_DISABLE_PROMPTS", "true")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                name=uri,
                id=known,
                resume="allow",
                config=_flat(config),
                settings=settings,
            )
        except wandb.errors.Error as error:
            # Its text may quote a key.
            raise UserError(
                f"output.tracker = 'wandb' cannot be used ({type(error).__name__}): set WANDB_API_KEY on rank 0's"
                " machine, or WANDB_MODE=offline"
            ) from None
        # Steps may come again after a restart, and a validation before the steps that led to it.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """Run of MLflow, at MLFLOW_TRACKING_URI; threads of its own send."""

    def __init__(self, config: RunConfig, uri: str, known: str | None) -> None:
        from mlflow.entities import Metric, Param, RunTag  # an optional package
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._metric, self._error = Metric, MlflowException
        self._client = MlflowClient()
        self._sent: list[Any] = []
        try:
            self.run_id = known or self._create()
            run = self._client.get_run(self.run_id)
            self._client.update_run(self.run_id, status="RUNNING", name=uri)
            if not run.data.params:
                params = [Param(key, str(value)) for key, value in _flat(config).items()]
                self._client.log_batch(self.run_id, params=params, tags=[RunTag("satfusion.run", uri)])
        except MlflowException as error:
            raise UserError(
                f"output.tracker = 'mlflow' cannot be used ({error.error_code}): see MLFLOW_TRACKING_URI on rank 0's"
                " machine"
            ) from None
