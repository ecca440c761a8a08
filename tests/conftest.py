"""Fixtures that every package's tests share."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.config import RunConfig, load_config
from pipeline.world import World, join_world, leave_world
from sharding.prepare.options import SampleOptions

# What makes datasets and servers is imported where it is used: tests marked gpu run without rasterio and boto3.
if TYPE_CHECKING:
    from cluster.local.objectstore import ObjectStore

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

GPU_TESTS = Path(__file__).with_name("gpu")
"""Where the tests marked gpu are, all of them."""


def pytest_configure() -> None:
    # A run in a shell's background ignores interrupts, and so would the commands that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # ``-m gpu`` runs on machines that cannot import what the other tests do.
    if config.option.markexpr != "gpu" or collection_path in (GPU_TESTS, *GPU_TESTS.parents):
        return None
    return None if GPU_TESTS in collection_path.parents else True


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
    from cluster.local.objectstore import ObjectStore

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
    from tests.datasets import TWO_A_SHARD, made_once, make_dataset

    return str(made_once(tmp_path_factory, "dataset", lambda folder: make_dataset(folder, TWO_A_SHARD, hr_side=264)))


@pytest.fixture(scope="session")
def small_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six other AOIs, split as those of `dataset_uri` and two a shard too, in a fifth of the pixels."""
    from tests.datasets import SMALL_TWO_A_SHARD, made_once, make_dataset

    def make(folder: Path) -> None:
        make_dataset(folder, SMALL_TWO_A_SHARD, revisits=2, hr_side=80)

    return str(made_once(tmp_path_factory, "small-dataset", make))


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
