"""Numbers of ranks: which a job may have, and which fits."""

from __future__ import annotations

import pytest

from cluster.jobs.placement import Placement, largest, room_in, worlds
from sharding.errors import UserError


@pytest.mark.parametrize(
    ("workers", "fewest", "most", "elastic"), [(3, 3, 3, False), ("3", 3, 3, False), ("2..8", 2, 8, True)]
)
def test_a_number_or_a_range(workers: int | str, fewest: int, most: int, elastic: bool) -> None:
    placement = Placement(workers)
    assert (placement.fewest, placement.most, placement.elastic) == (fewest, most, elastic)


@pytest.mark.parametrize("workers", ["", "two", "2..", "..4", "2...4", "2-4", "-1", "1.5", "٢..٤", "2..4..8"])
def test_what_is_no_range_is_refused(workers: str) -> None:
    with pytest.raises(UserError, match=r"--workers .* is no number of ranks: give N, or MIN\.\.MAX"):
        Placement(workers)


@pytest.mark.parametrize("workers", ["0..4", "4..2", 0, "1..999999"])
def test_a_range_that_cannot_be_is_refused(workers: int | str) -> None:
    with pytest.raises(UserError, match=f"--workers {workers} is out of range: it must be a whole number from 1"):
        Placement(workers)


@pytest.mark.parametrize(
    ("workers", "batch", "sizes"),
    [
        ("1..8", 12, (1, 2, 3, 4, 6)),
        ("5..12", 12, (6, 12)),
        ("2..100000", 8, (2, 4, 8)),  # no more ranks than chips
        (4, 12, (4,)),
    ],
)
def test_only_worlds_that_divide_the_batch_are_taken(workers: int | str, batch: int, sizes: tuple[int, ...]) -> None:
    assert worlds(Placement(workers), batch, 0) == sizes


def test_a_range_without_a_divisor_is_refused_and_so_is_a_number() -> None:
    with pytest.raises(UserError, match=r"no number of ranks in --workers 7\.\.11 divides train\.global_batch = 12"):
        worlds(Placement("7..11"), 12, 0)
    with pytest.raises(UserError, match=r"train\.global_batch = 12 is not divisible"):
        worlds(Placement(5), 12, 0)


@pytest.mark.parametrize(("room", "taken"), [(0, 0), (1, 0), (2, 2), (5, 4), (6, 6), (99, 6)])
def test_the_largest_that_fits_is_taken(room: int, taken: int) -> None:
    assert largest((2, 4, 6), room) == taken


def test_free_resources_are_counted_without_rounding() -> None:
    assert room_in({"CPU": 0.3}, Placement(9, cpus_per_worker=0.1)) == 3
    assert room_in({"CPU": 8.0, "GPU": 3.0}, Placement(9, gpus_per_worker=2)) == 1
    assert room_in({}, Placement(1)) == 0
