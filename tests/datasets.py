"""Datasets that several packages' tests share; making them needs rasterio, reading them does not."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sharding.run.dataset import ShardOptions, shard_folder
from sharding.run.plan import PlanOptions
from sharding.sources.synthetic.rasters import HR_SIDE, write_worldstrat
from sharding.storage import open_storage
from tests.conftest import SMALL

TWO_A_SHARD = ShardOptions(plan=PlanOptions(shard_bytes=7_000_000))
"""Of scenes of 3.4 MB."""

SMALL_TWO_A_SHARD = ShardOptions(SMALL, PlanOptions(shard_bytes=1_300_000))
"""Of scenes in a fifth of the pixels."""


def make_dataset(output: Path, options: ShardOptions, *, revisits: int = 8, hr_side: int = HR_SIDE) -> str:
    """Shard six generated AOIs into the folder ``output`` and return its URI."""
    with tempfile.TemporaryDirectory() as source:
        write_worldstrat(source, 6, seed=3, revisits=revisits, hr_side=hr_side)
        shard_folder(Path(source), open_storage(output), options, workers=1)
    return str(output)
