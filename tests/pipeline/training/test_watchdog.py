"""The watchdog: which groups hang, what it says of them, and how their processes end."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import TrainConfig
from pipeline.reporting.phases import Phases
from pipeline.signals import HUNG_STATUS
from pipeline.training.watchdog import Beat, Peer, Watchdog, report, verdict
from pipeline.world import Channel, join_world
from tests.distributed import Rank, RanksFailedError, run_ranks

BEAT = Beat(number=3, phase="step", step=7, idle=0.0, limit=120.0, place="node-a, pid 11")


@pytest.mark.parametrize(
    ("own", "peers", "hangs"),
    [
        (119.0, [], False),
        (121.0, [], True),
        (121.0, [(121.0, 120.0, 0.0)], True),
        (121.0, [(5.0, 120.0, 0.0)], False),  # another rank makes progress
        (121.0, [(121.0, 1800.0, 0.0)], False),  # another rank may take longer
        (121.0, [(1.0, 1800.0, 121.0)], True),  # another rank is silent, whatever it was doing
        (119.0, [(1.0, 120.0, 121.0)], False),  # this rank makes progress without it
    ],
)
def test_a_group_hangs_if_nobody_makes_progress_or_somebody_is_silent(
    own: float, peers: list[tuple[float, float, float]], hangs: bool
) -> None:
    others = {
        rank: Peer(replace(BEAT, idle=idle, limit=limit), silent) for rank, (idle, limit, silent) in enumerate(peers, 1)
    }
    assert verdict(replace(BEAT, idle=own), others, 120.0) == hangs


def test_the_silent_rank_is_named_first() -> None:
    others = {1: Peer(replace(BEAT, idle=121.0)), 2: Peer(replace(BEAT, idle=2.0, phase="data"), 119.0)}
    assert report(0, replace(BEAT, idle=120.5), others) == (
        "rank 2 (node-a, pid 11) at step 7 in phase 'data' without progress for 121.0 s, silent for 119.0 s;"
        " rank 1 (node-a, pid 11) at step 7 in phase 'step' without progress for 121.0 s;"
        " rank 0 (node-a, pid 11) at step 7 in phase 'step' without progress for 120.5 s"
    )


def hang(place: Rank, folder: Path) -> None:
    """Reach step 5 or 6, and then do nothing: rank 0 in a step, rank 1 while it waits for data."""
    log = os.open(folder / f"stderr-{place.rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 2)
    world, phases = join_world(), Phases()
    with Watchdog(phases, world, Channel(world), TrainConfig(hang_seconds=1)):
        phases.enter("step" if place.rank == 0 else "data", 6 - place.rank)
        threading.Event().wait()


@pytest.mark.distributed
def test_ranks_that_make_no_progress_end_with_their_stacks_and_a_status_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError, match=f"ended with status {HUNG_STATUS} "):
        run_ranks(hang, 2, tmp_path / "ranks", tmp_path, seconds=120)
    said = "".join((tmp_path / f"stderr-{rank}").read_text() for rank in (0, 1))
    assert re.search(r"the training hangs \(train\.hang_seconds = 1\), so rank [01] ends with status 76: rank", said)
    assert re.search(r"rank 0 \([^)]+, pid \d+\) at step 6 in phase 'step' without progress for", said)
    assert re.search(r"rank 1 \([^)]+, pid \d+\) at step 5 in phase 'data' without progress for", said)
    assert "most recent call first" in said
    assert re.search(r"line \d+ in hang\b", said)
