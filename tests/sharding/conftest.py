"""Small WorldStrat folders and datasets that the tests of this package share."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sharding.format.index import Index
from sharding.prepare.options import SampleOptions
from sharding.run.dataset import ShardOptions, shard_folder
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.sources.worldstrat.files import open_source
from sharding.sources.worldstrat.layout import AoiFiles, find_aois
from sharding.storage import Storage, open_storage
from tests.datasets import TWO_A_SHARD

SHARED = Path(__file__).resolve().parents[3] / "shared"
# A quarter of the real side: scenes take a tenth of a second, and everything is resized anyway.
HR_SIDE = 264
# How to shard `tiny`.
TINY = ShardOptions(SampleOptions(revisits=3))


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny images gain nothing from threads, and lose much where tests share the processors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "worldstrat-sample").is_dir():
        pytest.skip("needs ../shared/worldstrat-sample and ../shared/golden, which are not here")
    return SHARED


@dataclass(frozen=True)
class World:
    """A synthetic folder."""

    folder: Path
    names: list[str]


def digests(storage: Storage) -> dict[str, str]:
    """Return the SHA-256 of each object."""
    return {item.key: hashlib.sha256(storage.read(item.key)).hexdigest() for item in storage.list()}


def generation(storage: Storage) -> str:
    """Return the folder of the published generation, with a slash; empty for a dataset of format 2."""
    folder, slash, _ = Index.load(storage).splits["train"][0].name.rpartition("/")
    return folder + slash


def aois_of(folder: Path) -> list[AoiFiles]:
    """Return the AOIs of a folder."""
    return find_aois(open_source(folder, "l2a"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Six complete AOIs. Tests must not change it."""
    folder = tmp_path_factory.mktemp("world")
    return World(folder, write_worldstrat(folder, 6, seed=3, hr_side=HR_SIDE))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Six AOIs of very few pixels and three revisits, for what does not depend on the pictures."""
    folder = tmp_path_factory.mktemp("tiny")
    return World(folder, write_worldstrat(folder, 6, seed=4, revisits=TINY.sample.revisits, hr_side=80))


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty folder and an empty prefix of a real S3 server."""
    if request.param == "s3":
        return open_storage(request.getfixturevalue("s3").prefix())
    return open_storage(tmp_path / "out")


@pytest.fixture
def spoilt(tiny: World, tmp_path: Path) -> World:
    """A copy of `tiny` that a test may damage."""
    folder = tmp_path / "spoilt"
    shutil.copytree(tiny.folder, folder)
    return World(folder, tiny.names)


@dataclass(frozen=True)
class Dataset:
    """A dataset on disk."""

    storage: Storage
    index: Index

    @property
    def folder(self) -> Path:
        return Path(self.storage.uri)


@pytest.fixture(scope="session")
def dataset(world: World, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The six AOIs in shards of two, made by one worker."""
    storage = open_storage(tmp_path_factory.mktemp("dataset"))
    return Dataset(storage, shard_folder(world.folder, storage, TWO_A_SHARD).index)
