"""Values of steps reach every rank in order, one window late if the host does not wait for the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.training.step_values import LONGEST_WINDOW, StepValues
from pipeline.world import World
from tests.distributed import Rank, run_ranks


def put(values: StepValues, step: int, rank: int = 0) -> None:
    measured = {"step": torch.tensor(float(step)), "rank": torch.tensor(float(rank))}
    values.put(step, 0, measured, {"known": 10.0 * step})


def steps(values: StepValues, *, everything: bool = False) -> list[int]:
    return [row.step for row in values.arrived(everything=everything)]


@pytest.mark.parametrize(("lag", "seen"), [(0, [[1], [2], [3]]), (1, [[], [1], [2]]), (2, [[], [], [1]])])
def test_rows_come_as_many_windows_late_as_asked(lag: int, seen: list[list[int]], world: World) -> None:
    values = StepValues(world, 1, lag)
    found = []
    for step in (1, 2, 3):
        put(values, step)
        found.append(steps(values))
    assert found == seen
    assert steps(values, everything=True) == [1, 2, 3][3 - lag :]
    assert steps(values, everything=True) == []


def test_a_window_is_gathered_whole_and_cut_by_the_step_number(world: World) -> None:
    values = StepValues(world, 3, 0)
    found = []
    for step in range(2, 8):  # as after resuming at step 1
        put(values, step)
        found.append(steps(values))
    assert found == [[], [2, 3], [], [], [4, 5, 6], []]
    assert steps(values, everything=True) == [7]


def test_a_long_pause_between_log_rows_does_not_delay_what_stops_a_run(world: World) -> None:
    values = StepValues(world, 1000, 0)
    for step in range(1, LONGEST_WINDOW + 1):
        put(values, step)
    assert steps(values) == list(range(1, LONGEST_WINDOW + 1))


def gather(place: Rank) -> list[dict[str, list[float]]]:
    world = World(place.rank, place.world_size, torch.device("cpu"))
    values = StepValues(world, 2, 1)
    for step in (1, 2, 3):
        put(values, step, place.rank)
    return [
        {name: by_rank.tolist() for name, by_rank in row.by_rank.items()} for row in values.arrived(everything=True)
    ]


def test_a_row_holds_every_rank(tmp_path: Path) -> None:
    expected = [{"step": [step] * 2, "rank": [0.0, 1.0], "known": [10.0 * step] * 2} for step in (1.0, 2.0, 3.0)]
    assert run_ranks(gather, 2, tmp_path) == [expected, expected]
