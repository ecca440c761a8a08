"""The device of the tests marked gpu, and data for them that needs no rasterio.

``SATFUSION_GPU_TESTS_ON=cpu`` runs the same bodies with the CPU in the GPU's place: a check of the tests, not of CUDA.
``SATFUSION_KIT`` names a kit (benchmarks/gpu_kit.py) whose dataset is taken; without it one is generated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pipeline.config import RunConfig, load_config
from sharding.format.index import Index
from sharding.storage import open_storage
from tests.conftest import TINY
from tests.gpu.children import forbid_tf32

ON_CPU = os.environ.get("SATFUSION_GPU_TESTS_ON") == "cpu"
REASON = "needs CUDA, and torch sees none (SATFUSION_GPU_TESTS_ON=cpu runs the same bodies on the CPU)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ON_CPU or torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu") if ON_CPU else torch.device("cuda", 0)


@pytest.fixture
def full_float32() -> Iterator[None]:
    """Keep TF32 out of products and convolutions."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [backend.fp32_precision for backend in backends]
    forbid_tf32()
    yield
    for backend, precision in zip(backends, before, strict=True):
        backend.fp32_precision = precision


@pytest.fixture(scope="session")
def data_uri(request: pytest.FixtureRequest) -> str:
    if kit := os.environ.get("SATFUSION_KIT"):
        return str(Path(kit).resolve() / "small")
    pytest.importorskip(
        "rasterio", reason="needs a dataset: SATFUSION_KIT names none, and without rasterio none is made"
    )
    return str(request.getfixturevalue("small_uri"))


@pytest.fixture(scope="session")
def tiny_run(data_uri: str) -> Callable[..., RunConfig]:
    """Return a function from (run folder, overrides) to a run of a tiny network on `data_uri`."""
    revisits = Index.load(open_storage(data_uri)).preparation.revisits

    def make(output: Path, *overrides: str) -> RunConfig:
        own = (f"data.uri={data_uri}", f"output.uri={output}", *TINY, f"model.revisits={revisits}")
        return load_config("srcnn_pnn", [*own, *overrides])

    return make
