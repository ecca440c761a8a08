"""Device of a rank, on machines with GPUs too: CUDA's answers are simulated."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from pipeline.world import World, join_world

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Simulate CUDA with the third GPU selected; return the devices that are selected afterwards."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("DS_ACCELERATOR", "unset")  # Both are restored after the test.
    monkeypatch.setenv("LOCAL_RANK", "1")
    return chosen


def test_a_gloo_group_computes_on_the_cpu_whatever_gpus_there_are(
    world: World, gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    assert join_world() == World(0, 1, CPU)
    assert gpus == []
    assert (os.environ["DS_ACCELERATOR"], os.environ["LOCAL_RANK"]) == ("cpu", "1")


def test_an_nccl_group_computes_where_its_maker_put_it(
    world: World, gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray gives rank 1 of a node its third GPU when each rank has two."""
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    assert join_world().device == torch.device("cuda", 2)
    assert (os.environ["DS_ACCELERATOR"], os.environ["LOCAL_RANK"]) == ("cuda", "2")


def test_without_a_group_the_local_ranks_gpu_is_taken(
    gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    backends: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **store: backends.append(backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    assert join_world().device == torch.device("cuda", 1)
    assert gpus == [torch.device("cuda", 1)]
    assert backends == ["nccl"]
