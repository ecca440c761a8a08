"""Scalars of a run at an experiment tracker: W&B or MLflow, where the package is installed and `output.tracker` asks.

Where the tracker is, and the key that opens it, are settings of rank 0's environment (WANDB_*, MLFLOW_*), and no part
of a configuration. The run's id there is kept in the run folder, so a restart continues the same run.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from pipeline.config import RunConfig
from pipeline.world import World
from sharding.errors import UserError
from sharding.schema import decode
from sharding.storage import NotFoundError, Storage

logger = logging.getLogger(__name__)

ID_FILE = "tracker.json"
"""File in the run folder with the ids of the run, by tracker."""
PROJECT = "satfusion"
"""Project of W&B and experiment of MLflow, unless the environment names another."""
_MOST_WAITING = 1000
"""Rows that MLflow may have in its queue; then the training waits for it."""


class _Client(Protocol):
    """Run at a tracker, by its package."""

    run_id: str
    """Its id there."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send scalars of a step, without waiting for the tracker."""

    def close(self) -> None:
        """Wait for what is being sent, and end the run."""


class Tracker:
    """Run at a tracker on rank 0; what goes wrong after its start is logged once and stops no training."""

    def __init__(self, name: str, client: _Client) -> None:
        """Send to a run that is open."""
        self._name, self._client, self._lost = name, client, False

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send scalars of a step, by their tags."""
        self._try(lambda: self._client.scalars(step, values))

    def close(self) -> None:
        """Wait for what is being sent, and end the run."""
        self._try(self._client.close)

    def _try(self, send: Callable[[], None]) -> None:
        if self._lost:
            return
        try:
            send()
        except Exception as error:  # of another program: none may end a training
            self._lost = True
            # Its text may quote a key.
            logger.error("no more scalars go to %s (%s); the run folder has all", self._name, type(error).__name__)


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
    package, make = CLIENTS[name]
    ids = _read_ids(run)
    try:
        client = make(config, run.uri, ids.get(name))
    except ImportError:
        raise UserError(
            f"output.tracker = '{name}' needs the package {package}, which is not installed on rank 0's machine:"
            f" `pip install {package}`, or leave the key out"
        ) from None
    if client.run_id != ids.get(name):
        run.write(ID_FILE, msgspec.json.encode(ids | {name: client.run_id}))
    return Tracker(name, client)


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
    """Run of Weights & Biases, whose own process sends it; with WANDB_MODE=offline it stays in WANDB_DIR."""

    def __init__(self, config: RunConfig, uri: str, known: str | None) -> None:
        """Start the run, or continue the one whose id is known."""
        import wandb  # an optional package

        settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                name=uri,
                id=known or uuid.uuid4().hex,
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
        self.run_id: str = self._run.id
        # Steps come again after a restart, and a validation before the steps that led to it.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Hand scalars of a step to its process."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Wait for the process."""
        self._run.finish()


class _Mlflow:
    """Run of MLflow, at MLFLOW_TRACKING_URI; threads of its own send it."""

    def __init__(self, config: RunConfig, uri: str, known: str | None) -> None:
        """Start the run, or continue the one whose id is known."""
        from mlflow import MlflowClient, MlflowException  # an optional package
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient()
        self._waiting: deque[Any] = deque()
        try:
            self.run_id: str = known or self._create(uri)
            self._client.update_run(self.run_id, status="RUNNING")
            if not known:
                params = [Param(key, str(value)) for key, value in _flat(config).items()]
                self._client.log_batch(self.run_id, params=params)
        except MlflowException as error:
            raise UserError(
                f"output.tracker = 'mlflow' cannot be used ({error.error_code}): look at MLFLOW_TRACKING_URI on rank"
                " 0's machine"
            ) from None

    def _create(self, uri: str) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        run_id: str = self._client.create_run(experiment, run_name=uri).info.run_id
        return run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Queue scalars of a step."""
        now = int(time.time() * 1000)
        metrics = [self._metric(tag, value, now, step) for tag, value in values.items()]
        self._waiting.append(self._client.log_batch(self.run_id, metrics=metrics, synchronous=False))
        if len(self._waiting) > _MOST_WAITING:
            self._waiting.popleft().wait()

    def close(self) -> None:
        """Wait for the queue, and mark the run as ended."""
        for sent in self._waiting:
            sent.wait()
        self._client.set_terminated(self.run_id)


CLIENTS: Mapping[str, tuple[str, Callable[[RunConfig, str, str | None], _Client]]] = {
    "wandb": ("wandb", _Wandb),
    "mlflow": ("mlflow-skinny", _Mlflow),
}
"""Packages and clients by the values of ``output.tracker``."""
