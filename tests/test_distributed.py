from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import Rank, RanksFailedError, run_ranks

pytestmark = pytest.mark.distributed


def sum_of_ranks(place: Rank, offset: int) -> int:
    value = torch.tensor(place.rank + offset)
    dist.all_reduce(value)
    return int(value)


def fail_differently(place: Rank) -> None:
    raise ValueError(f"reason of rank {place.rank}")


def die_on_rank_one(place: Rank, folder: str) -> None:
    Path(folder, f"pid-{place.rank}").write_text(str(os.getpid()))
    if place.rank == 1:
        while not Path(folder, "pid-0").exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def test_ranks_speak_to_each_other(tmp_path: Path) -> None:
    assert run_ranks(sum_of_ranks, 2, tmp_path, 10) == [21, 21]


def test_every_failing_rank_shows_its_error(tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(fail_differently, 2, tmp_path)
    assert "ValueError: reason of rank 0" in str(caught.value)
    assert "ValueError: reason of rank 1" in str(caught.value)


def test_a_dead_rank_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError, match="rank 1 ended with status -9"):
        run_ranks(die_on_rank_one, 2, tmp_path, str(tmp_path), grace_seconds=0.5)
    for rank in range(2):
        assert not Path("/proc", (tmp_path / f"pid-{rank}").read_text()).exists()
