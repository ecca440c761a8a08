"""Fixtures that every package's tests share."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from cluster.local.objectstore import ObjectStore
from pipeline.config import RunConfig, load_config
from pipeline.world import World, join_world, leave_world
from sharding.prepare.options import SampleOptions
from sharding.run.dataset import ShardOptions, shard_folder
from sharding.run.plan import PlanOptions
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import open_storage

TINY = (
    "model.hidden=8",
    "model.revisits=2",
    "data.random_windows=true",
    "train.global_batch=4",
    "train.schedule=warmup_cosine",
    "train.learning_rate=1e-3",
    "train.threads_per_rank=1",
    "train.log_batches=true",
    "output.panels=1",
)
"""A network of minimal width, the same in every test of the loop."""

SMALL = SampleOptions(revisits=2, lr_size=150, hr_size=200)
"""The smallest revisits that hold nine chips."""

TWO_A_SHARD = ShardOptions(plan=PlanOptions(shard_bytes=7_000_000))
"""Of scenes of 3.4 MB."""


def pytest_configure() -> None:
    # A run in a shell's background ignores interrupts, and so would the commands that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


class S3:
    """A running S3 server whose endpoint and keys stand in the environment."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self._numbers = itertools.count()

    @property
    def environment(self) -> Mapping[str, str]:
        """Endpoint, keys and region, for a process that is given an environment of its own."""
        return self.store.environment

    def bucket(self) -> str:
        """Make an empty bucket and return its URI, ``s3://test-<n>``."""
        name = f"test-{next(self._numbers)}"
        self.store.create_bucket(name)
        return f"s3://{name}"

    def prefix(self) -> str:
        """Return the URI of a fresh prefix in a shared bucket, ``s3://shared/<n>`` (cheaper)."""
        return f"s3://shared/{next(self._numbers)}"


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with (
        ObjectStore(tmp_path_factory.mktemp("s3"), bucket="shared") as store,
        pytest.MonkeyPatch.context() as patch,
    ):
        # A profile or token of the developer's own would win over, or be sent along with, the server's keys.
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield S3(store)


@pytest.fixture(scope="session")
def dataset_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four training AOIs, one to validate, one to test."""
    source, output = tmp_path_factory.mktemp("worldstrat"), tmp_path_factory.mktemp("dataset")
    write_worldstrat(source, 6, seed=3, hr_side=264)
    shard_folder(source, open_storage(output), TWO_A_SHARD, workers=1)
    return str(output)


@pytest.fixture(scope="session")
def small_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six other AOIs, split as those of `dataset_uri` and two a shard too, in a fifth of the pixels."""
    source, output = tmp_path_factory.mktemp("small-worldstrat"), tmp_path_factory.mktemp("small-dataset")
    write_worldstrat(source, 6, seed=3, revisits=2, hr_side=80)
    shard_folder(source, open_storage(output), ShardOptions(SMALL, PlanOptions(shard_bytes=1_300_000)), workers=1)
    return str(output)


@pytest.fixture(scope="session")
def make_config(small_uri: str) -> Callable[..., RunConfig]:
    """Return a function from (run folder, overrides) to the tiny run's configuration, on the small AOIs."""

    def make(output: Path | str, *overrides: str) -> RunConfig:
        return load_config("srcnn_pnn", [f"data.uri={small_uri}", f"output.uri={output}", *TINY, *overrides])

    return make


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Return the process group of one that this process forms; DeepSpeed cannot join a second one."""
    yield join_world()
    leave_world()
