"""`data.store_wait_seconds`: how long a run waits for a store that is away, for shards and for its run folder alike."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.config import RunConfig, load_config
from pipeline.training.loop import run_training
from pipeline.world import COLLECTIVE_LIMIT, World
from sharding.errors import UserError
from sharding.storage import StorageUnavailableError, open_storage, retries
from tests.command import column
from tests.conftest import S3
from tests.faults import FaultProxy, Faults, Request
from tests.pipeline.data.test_data import copy_to

MakeConfig = Callable[..., RunConfig]
STEPS = ("train.max_steps=3", "train.engine=torch", "train.checkpoint_every=2", "train.hang_seconds=60")
AWAY = 12
"""Requests in a row that a store which is away for a while refuses."""


class Outage:
    """A store that refuses requests of a method whose path holds a text, a number of times from the first one on."""

    def __init__(self, method: str, text: str, times: float) -> None:
        self._method, self._text, self._left = method, text, times
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Faults:
        """Return the fault of a request: 503 while the outage lasts."""
        with self._lock:
            hit = request.method == self._method and self._text in request.path and self._left > 0
            self._left -= hit
        return Faults(busy=float(hit))


@pytest.fixture
def proxy(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Return a proxy that the endpoint leads to; without the setting, a store would be waited for for no time."""
    with FaultProxy(s3.environment["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setattr(retries, "KNOWN_S", 0.0)
        monkeypatch.setattr(retries, "LONGEST_PAUSE_S", 0.05)
        yield proxy


@pytest.mark.parametrize(("method", "text"), [("GET", ".tar"), ("PUT", "/checkpoints/")])
def test_a_run_waits_for_shards_and_for_its_run_folder(
    method: str,
    text: str,
    world: World,
    s3: S3,
    proxy: FaultProxy,
    small_uri: str,
    make_config: MakeConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "QUIET_S", 0.0)
    data, run = s3.prefix(), s3.prefix()
    copy_to(small_uri, data)
    run_training(make_config(tmp_path / "undisturbed", *STEPS))
    proxy.faults = Outage(method, text, AWAY)
    with caplog.at_level(logging.WARNING):
        run_training(make_config(run, *STEPS, f"data.uri={data}", "data.store_wait_seconds=300"))
    assert proxy.done("busy") == AWAY
    assert " s of 300 s" in caplog.text
    assert "answers again, after" in caplog.text
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "metrics.csv").write_bytes(open_storage(run).read("metrics.csv"))
    for name in ("step", "train/loss"):
        assert column(copy, name) == column(tmp_path / "undisturbed", name)


@pytest.mark.parametrize(("method", "text"), [("GET", ".tar"), ("PUT", "/checkpoints/")])
def test_a_store_that_stays_away_counts_after_that_time(
    method: str,
    text: str,
    world: World,
    s3: S3,
    proxy: FaultProxy,
    small_uri: str,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "KNOWN_S", 10_000.0)
    data = s3.prefix()
    copy_to(small_uri, data)
    proxy.faults = Outage(method, text, float("inf"))
    with pytest.raises(StorageUnavailableError, match="cannot serve"):
        run_training(make_config(s3.prefix(), *STEPS, f"data.uri={data}", "data.store_wait_seconds=0.3"))
    assert proxy.done("busy") >= retries.LEAST_ATTEMPTS


def test_the_wait_is_shorter_than_that_of_a_collective() -> None:
    longest = COLLECTIVE_LIMIT.total_seconds()
    with pytest.raises(UserError, match=r"data\.store_wait_seconds"):
        load_config("srcnn_pnn", [f"data.store_wait_seconds={longest}"])
