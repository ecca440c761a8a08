"""Failures after which a job resumes; Ray's answers are simulated instead of a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
from ray.train import TrainingFailedError

from cluster.jobs import train_job as worker
from cluster.jobs.placement import Placement
from cluster.jobs.train_job import Job, run_job
from pipeline.config import load_config
from sharding.errors import UserError
from sharding.storage import StorageUnavailableError, retries

AWAY = StorageUnavailableError("the store is away")
MISTAKE = UserError("the mistake")
BROKEN = ConnectionError("broken by another rank")


def failure(*failures: Exception) -> TrainingFailedError:
    error = TrainingFailedError("ranks failed")
    error.worker_failures = dict(enumerate(failures))
    return error


class Attempts:
    """Outcomes of the attempts; a job removes those it has taken from ``left``."""

    def __init__(self) -> None:
        self.left: list[Exception | None] = []

    def run(self, max_failures: int, *ends: Exception | None) -> None:
        self.left = list(ends)
        run_job(Job(load_config("srcnn_pnn").to_dict(), Placement(2, max_failures=max_failures)))

    def fit(self, job: Job, function: object) -> None:
        if end := self.left.pop(0):
            raise end


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Attempts:
    attempts = Attempts()
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    monkeypatch.setattr(worker, "_RESTART_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(worker, "_fit", attempts.fit)
    return attempts


def test_lost_ranks_and_a_store_that_is_away_are_tried_again(attempts: Attempts) -> None:
    attempts.run(3, failure(), failure(BROKEN, AWAY), failure(BROKEN), None)
    assert attempts.left == []


def test_a_store_that_stays_away_ends_the_job_in_its_own_words(attempts: Attempts) -> None:
    with pytest.raises(StorageUnavailableError, match="the store is away"):
        attempts.run(1, failure(AWAY), failure(AWAY), None)
    assert attempts.left == [None]


def test_ranks_that_are_lost_too_often_end_the_job(attempts: Attempts) -> None:
    with pytest.raises(TrainingFailedError):
        attempts.run(1, failure(AWAY), failure(BROKEN), None)
    assert attempts.left == [None]


@pytest.mark.parametrize("failures", [(BROKEN, MISTAKE), (AWAY, MISTAKE), (MISTAKE, AWAY)])
def test_a_users_mistake_is_found_among_its_consequences_and_not_tried_again(
    attempts: Attempts, failures: tuple[Exception, ...]
) -> None:
    with pytest.raises(UserError, match="the mistake"):
        attempts.run(3, failure(*failures), None)
    assert attempts.left == [None]


def test_a_store_that_does_not_answer_at_the_start_is_refused_before_a_rank_is_started(
    attempts: Attempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("srcnn_pnn", ["data.uri=s3://bucket/shards", "output.uri=/nowhere/run"])
    monkeypatch.setattr(worker, "_fit", lambda job, function: pytest.fail("a rank was started"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(retries, "FIRST_CONTACT_S", 0.5)
    with pytest.raises(StorageUnavailableError, match="s3://bucket/shards"):
        run_job(Job(config.to_dict(), Placement(2)))


def test_keys_are_the_ranks_matter(attempts: Attempts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The driver's node may have no keys while the ranks' nodes have some."""
    config = load_config("srcnn_pnn", ["data.uri=s3://bucket/shards", "output.uri=s3://bucket/run"])
    began: list[Job] = []
    monkeypatch.setattr(worker, "_fit", lambda job, function: began.append(job))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    run_job(Job(config.to_dict(), Placement(2)))
    assert len(began) == 1


def test_a_small_cluster_may_grow(attempts: Attempts, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [1.0, 1.0, 1.0, 4.0]
    asked: list[object] = []
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": looks.pop(0)}}])
    monkeypatch.setattr(ray.util, "placement_group", lambda bundles, strategy: asked.append(bundles))
    monkeypatch.setattr(ray.util, "remove_placement_group", lambda group: asked.append("removed"))
    monkeypatch.setattr(worker, "_ROOM_POLL_SECONDS", 0.0)
    worker._await_room(Placement(2, wait_for_resources=60))
    assert asked == [[{"CPU": 1.0}, {"CPU": 1.0}], "removed"]
    assert looks == []
