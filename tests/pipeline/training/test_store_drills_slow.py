"""The real command whose store is away for half a minute, and killed at each request of a checkpoint's upload."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.config import RunConfig
from pipeline.training.checkpoint import complete_checkpoints, newest_checkpoint
from sharding.storage import open_storage
from tests.command import column, start_command
from tests.conftest import S3
from tests.faults import FaultProxy, Faults, Request

MakeConfig = Callable[..., RunConfig]
OPTIONS = (
    "train.engine=torch",
    "train.checkpoint_every=1",
    "train.keep_checkpoints=1",
    "train.log_every=1",
    "output.panels=0",
)
POINTS = (
    ("PUT", "step-1/state.pt", 0),
    ("PUT", "step-1/COMPLETE", 0),
    ("DELETE", "step-1/checkpoint.json", 2),
    ("DELETE", "step-3/COMPLETE", 2),
    ("PUT", "step-3/state.pt", 2),
    ("PUT", "step-3/checkpoint.json", 2),
    ("PUT", "step-3/COMPLETE", 2),
    ("DELETE", "step-2/state.pt", 3),
    ("PUT", "best-4/state.pt", 3),
    ("PUT", "best-4/checkpoint.json", 3),
    ("PUT", "best-4/COMPLETE", 3),
    ("PUT", "step-4/state.pt", 3),
    ("PUT", "step-4/COMPLETE", 3),
)
"""Requests at which the run is killed, one start after the other, and the step that the next start resumes after."""
STEPS = 4
AWAY_S = 30.0
"""Longer than the limit of a hang in the test."""


def written(config: RunConfig, path: Path) -> list[str]:
    path.write_text(config.to_toml())
    return ["train", str(path)]


def weights(uri: str, step: int) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(open_storage(uri))
    assert checkpoint is not None
    assert checkpoint.state.step == step
    return dict(checkpoint.state.weights)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def columns_of(uri: str, folder: Path) -> list[list[str]]:
    """Return steps, losses and chips of a run on S3."""
    folder.mkdir()
    for name in ("metrics.csv", "batches.csv"):
        (folder / name).write_bytes(open_storage(uri).read(name))
    chips = [column(folder, name, "batches.csv") for name in ("step", "chips")]
    return [column(folder, "step"), column(folder, "train/loss"), *chips]


class Held:
    """A store that keeps the first request of a kind waiting, and from then on sees no request until it is let go."""

    def __init__(self, method: str, key: str) -> None:
        self._method, self._key = method, f"/checkpoints/{key}"
        self.arrived, self.let_go = threading.Event(), threading.Event()

    def __call__(self, request: Request) -> Faults:
        """Return no fault before the request; hold it and the later ones, and then reset them."""
        if request.method == self._method and request.path.partition("?")[0].endswith(self._key):
            self.arrived.set()
        if not self.arrived.is_set():
            return Faults()
        self.let_go.wait()
        return Faults(reset=1.0)


@pytest.mark.slow
def test_a_run_killed_at_each_request_of_an_upload_resumes_from_the_last_complete_checkpoint(
    s3: S3, make_config: MakeConfig, tmp_path: Path
) -> None:
    reference, run = s3.prefix(), s3.prefix()
    with FaultProxy(s3.environment["AWS_ENDPOINT_URL"]) as proxy:
        environment = {**s3.environment, "AWS_ENDPOINT_URL": proxy.url}

        def train(uri: str) -> str:
            command = written(make_config(uri, *OPTIONS, f"train.max_steps={STEPS}"), tmp_path / "run.toml")
            finished = start_command(1, command, environment).wait()
            assert finished.statuses == [0], finished.output
            return finished.output

        def train_until(method: str, key: str) -> str:
            held = Held(method, key)
            proxy.faults = held
            command = written(make_config(run, *OPTIONS, f"train.max_steps={STEPS}"), tmp_path / "run.toml")
            ranks = start_command(1, command, environment)
            try:
                while not held.arrived.wait(0.1):
                    assert ranks.processes[0].poll() is None, f"{method} {key} did not come: {ranks.output()}"
            finally:
                ranks.kill()
                held.let_go.set()
            return ranks.output()

        train(reference)
        after = 0
        for method, key, complete in POINTS:
            said = train_until(method, key)
            assert (f"resuming from {run}/checkpoints/step-{after}\n" in said) == (after > 0), said
            after = complete
            assert complete_checkpoints(open_storage(run), "step")[-1:] == ([complete] if complete else []), said
        proxy.faults = Faults()
        said = train(run)
    assert f"resuming from {run}/checkpoints/step-{after}\n" in said
    assert same(weights(run, STEPS), weights(reference, STEPS))
    assert columns_of(run, tmp_path / "ours") == columns_of(reference, tmp_path / "theirs")
    stored, expected = ({item.key for item in open_storage(uri).list()} for uri in (run, reference))
    assert {key for key in stored if "events/" not in key} == {key for key in expected if "events/" not in key}


@pytest.mark.slow
def test_a_store_that_is_away_for_longer_than_a_hang_may_take_is_waited_for(
    s3: S3, make_config: MakeConfig, tmp_path: Path
) -> None:
    limits = ("train.hang_seconds=15", "output.sync_seconds=1", "train.max_steps=3")
    with FaultProxy(s3.environment["AWS_ENDPOINT_URL"]) as proxy:
        environment = {**s3.environment, "AWS_ENDPOINT_URL": proxy.url}
        ends: list[float] = []

        def away(request: Request) -> Faults:
            """Refuse all requests for a while, from the first upload of a checkpoint on."""
            if not ends and request.method == "PUT" and "/checkpoints/step-2/" in request.path:
                ends.append(time.monotonic() + AWAY_S)
            return Faults(busy=float(bool(ends) and time.monotonic() < ends[0]))

        reference, run = s3.prefix(), s3.prefix()
        for uri, faults in ((reference, Faults()), (run, away)):
            proxy.faults = faults
            command = written(make_config(uri, *OPTIONS, *limits), tmp_path / "run.toml")
            finished = start_command(1, command, environment).wait()
            assert finished.statuses == [0], finished.output
        assert proxy.done("busy") > 1
        assert " s of 600 s" in finished.output
        assert "answers again, after" in finished.output
    assert same(weights(run, 3), weights(reference, 3))
