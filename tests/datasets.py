"""Datasets that several packages' tests share; making them needs rasterio, reading them does not."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sharding.run.dataset import ShardOptions, shard_folder
from sharding.run.plan import PlanOptions
from sharding.sources.synthetic.rasters import HR_SIDE, write_worldstrat
from sharding.storage import open_storage
from tests.conftest import SMALL

TWO_A_SHARD = ShardOptions(plan=PlanOptions(shard_bytes=7_000_000))
"""Of scenes of 3.4 MB."""

SMALL_TWO_A_SHARD = ShardOptions(SMALL, PlanOptions(shard_bytes=1_300_000))
"""Of scenes in a fifth of the pixels."""


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder ``name`` that ``make`` fills once for all test workers; nobody may change what is in it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / name
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = root / f"{name}.partial"
            make(partial)
            partial.rename(folder)
    return folder


def make_dataset(output: Path, options: ShardOptions, *, revisits: int = 8, hr_side: int = HR_SIDE) -> str:
    """Shard six generated AOIs into the folder ``output`` and return its URI."""
    with tempfile.TemporaryDirectory() as source:
        write_worldstrat(source, 6, seed=3, revisits=revisits, hr_side=hr_side)
        shard_folder(Path(source), open_storage(output), options, workers=1)
    return str(output)
