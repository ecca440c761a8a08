"""Scalars of a run at an experiment tracker: W&B or MLflow, where the package is installed and `output.tracker` asks.

Where the tracker is, and the key that opens it, are settings of rank 0's environment (WANDB_*, MLFLOW_*), and no part
of a configuration. The run's id there is kept in the run folder, so a restart continues the same run.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import uuid
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
_MOST_WAITING = 10_000
"""Rows that may wait for the tracker; one more, and it gets no more of them: no training waits for it."""
_CLOSE_S = 30.0
"""Seconds that the end of a run waits for the tracker."""


class _Client(Protocol):
    """Run at a tracker, by its package."""

    run_id: str
    """Its id there."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send scalars of a step."""

    def close(self) -> None:
        """Wait for what is being sent, and end the run."""


class Tracker:
    """Run at a tracker on rank 0, in a thread of its own; what goes wrong after its start is logged once.

    No training waits for a tracker, and none ends because of it.
    """

    def __init__(self, name: str, client: _Client) -> None:
        """Send to a run that is open."""
        self._name, self._client, self._lost = name, client, False
        self._waiting: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._send, name="tracker", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Queue scalars of a step, by their tags."""
        self._put((step, values))

    def close(self) -> None:
        """Wait for what is being sent, `_CLOSE_S` at most, and end the run."""
        self._put(None)
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            self._lose("it does not answer")

    def _put(self, row: tuple[int, Mapping[str, float]] | None) -> None:
        if not self._lost:
            try:
                self._waiting.put_nowait(row)
            except queue.Full:
                self._lose("it is too slow")

    def _send(self) -> None:
        try:
            while (row := self._waiting.get()) is not None:
                self._client.scalars(*row)
            self._client.close()
        except Exception as error:  # of another program: none may end a training
            self._lose(type(error).__name__)  # its text may quote a key

    def _lose(self, why: str) -> None:
        if not self._lost:
            self._lost = True
            logger.error("no more scalars go to %s (%s); the run folder has all", self._name, why)


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


def _open(name: str, config: RunConfig, run: Storage) -> Tracker | None:
    """Open the run; None if it was open before this start and cannot be continued, since a restart has to go on."""
    package, make = CLIENTS[name]
    ids = _read_ids(run)
    try:
        client = make(config, run.uri, ids.get(name))
    except ModuleNotFoundError as error:
        raise UserError(
            f"output.tracker = '{name}' needs the package {error.name}, which is not installed on rank 0's machine:"
            f" `pip install {package}`, or leave the key out"
        ) from None
    except Exception as error:  # of another program; its text may quote a key
        if name in ids:
            logger.error("no scalars go to %s (%s); the run folder has all", name, type(error).__name__)
            return None
        raise UserError(
            f"output.tracker = '{name}' cannot be used ({type(error).__name__}): {REMEDIES[name]}"
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
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=uri,
            id=known or uuid.uuid4().hex,
            resume="allow",
            config=_flat(config),
            settings=settings,
        )
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
    """Run of MLflow, at MLFLOW_TRACKING_URI."""

    def __init__(self, config: RunConfig, uri: str, known: str | None) -> None:
        """Start the run, or continue the one whose id is known."""
        from mlflow import MlflowClient  # an optional package
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient()
        self.run_id: str = known or self._create(uri)
        self._client.update_run(self.run_id, status="RUNNING")
        if not known:
            params = [Param(key, str(value)) for key, value in _flat(config).items()]
            self._client.log_batch(self.run_id, params=params)

    def _create(self, uri: str) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        run_id: str = self._client.create_run(experiment, run_name=uri).info.run_id
        return run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send scalars of a step."""
        now = int(time.time() * 1000)
        metrics = [self._metric(tag, value, now, step) for tag, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self.run_id)


CLIENTS: Mapping[str, tuple[str, Callable[[RunConfig, str, str | None], _Client]]] = {
    "wandb": ("wandb", _Wandb),
    "mlflow": ("mlflow-skinny", _Mlflow),
}
"""Packages and clients by the values of ``output.tracker``."""
REMEDIES = {
    "wandb": "set WANDB_API_KEY on rank 0's machine, or WANDB_MODE=offline",
    "mlflow": "look at MLFLOW_TRACKING_URI on rank 0's machine",
}
"""What the user can do if a tracker cannot be used, by the values of ``output.tracker``."""
