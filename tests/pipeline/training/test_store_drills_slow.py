"""The real command while its store answers 503 for half a minute, and killed at each upload of a checkpoint."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.config import RunConfig
from pipeline.training.checkpoint import complete_checkpoints, newest_checkpoint
from sharding.storage import open_storage
from tests.command import Ranks, start_command
from tests.conftest import S3
from tests.faults import FaultProxy, Faults, Request

MakeConfig = Callable[..., RunConfig]
OPTIONS = ("train.engine=torch", "train.max_steps=6", "train.checkpoint_every=2", "output.panels=0")
AWAY_S = 30.0
"""Longer than the limit of a hang in the test."""


def write(config: RunConfig, path: Path) -> list[str]:
    path.write_text(config.to_toml())
    return ["train", str(path)]


def weights(uri: str) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(open_storage(uri))
    assert checkpoint is not None
    assert checkpoint.state.step == 6
    return dict(checkpoint.state.weights)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


class Kill:
    """Kills a process when the k-th PUT for step 4 arrives, which the store then does not see."""

    def __init__(self, number: int) -> None:
        self.number, self.count, self.ranks = number, 0, list[Ranks]()
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Faults:
        """Return no fault, but a reset from the k-th PUT on."""
        with self._lock:
            self.count += request.method == "PUT" and "/checkpoints/step-4/" in request.path
            hit = 0 < self.number <= self.count
            if hit:
                for ranks in self.ranks:
                    ranks.kill()
        return Faults(reset=float(hit))


@pytest.mark.slow
def test_a_run_killed_at_any_upload_of_a_checkpoint_resumes_from_the_one_before(
    s3: S3, make_config: MakeConfig, tmp_path: Path
) -> None:
    with FaultProxy(s3.environment["AWS_ENDPOINT_URL"]) as proxy:
        environment = {**s3.environment, "AWS_ENDPOINT_URL": proxy.url}

        def train(run: str, kill: Kill) -> tuple[list[int], str]:
            proxy.faults = kill
            ranks = start_command(1, write(make_config(run, *OPTIONS), tmp_path / "run.toml"), environment)
            kill.ranks.append(ranks)
            finished = ranks.wait()
            return finished.statuses, finished.output

        reference, undisturbed = s3.prefix(), Kill(0)
        statuses, said = train(reference, undisturbed)
        assert statuses == [0], said
        assert undisturbed.count >= 2  # the state, and what makes it complete
        for number in range(1, undisturbed.count + 1):
            run = s3.prefix()
            statuses, said = train(run, Kill(number))
            assert statuses == [-9], said
            assert complete_checkpoints(open_storage(run), "step") == [2]
            statuses, said = train(run, Kill(0))
            assert statuses == [0], said
            assert f"resuming from {run}/checkpoints/step-2" in said
            assert same(weights(run), weights(reference))
            stored, expected = (
                {item.key for item in open_storage(uri).list("checkpoints/")} for uri in (run, reference)
            )
            assert stored == expected  # and nothing of the killed upload


@pytest.mark.slow
def test_a_store_that_answers_503_for_longer_than_a_hang_may_take_is_waited_for(
    s3: S3, make_config: MakeConfig, tmp_path: Path
) -> None:
    limits = ("train.hang_seconds=15", "output.sync_seconds=1")
    with FaultProxy(s3.environment["AWS_ENDPOINT_URL"]) as proxy:
        environment = {**os.environ, **s3.environment, "AWS_ENDPOINT_URL": proxy.url}
        ends: list[float] = []

        def away(request: Request) -> Faults:
            """Refuse all requests for a while, from the first upload of a checkpoint on."""
            if not ends and request.method == "PUT" and "/checkpoints/step-2/" in request.path:
                ends.append(time.monotonic() + AWAY_S)
            return Faults(busy=float(bool(ends) and time.monotonic() < ends[0]))

        reference, run = s3.prefix(), s3.prefix()
        for uri, faults in ((reference, Faults()), (run, away)):
            proxy.faults = faults
            command = write(make_config(uri, *OPTIONS, *limits), tmp_path / "run.toml")
            finished = start_command(1, command, environment).wait()
            assert finished.statuses == [0], finished.output
        assert proxy.done("busy") > 1
        assert " s of 600 s" in finished.output
        assert "answers again, after" in finished.output
        assert same(weights(run), weights(reference))
