"""Lost, drained and cut nodes and a stopped job on real Ray nodes, by the drills' program."""

from __future__ import annotations

import pytest

from benchmarks.drill_network import available
from benchmarks.drills import FAULTS, main

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_lost_node_and_a_stop_end_like_a_run_that_nothing_disturbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lost", "stop"]) == 0
    *_, lost, stopped = capsys.readouterr().out.splitlines()
    assert lost.startswith(FAULTS["lost"].about)
    assert "chips yes, losses to" in lost, "two ranks and one round differently"
    assert float(lost.rpartition("to ")[2]) <= 1e-4, "rounding grows over 40 steps at rate 1e-3: 2e-5 was measured"
    assert stopped.startswith(FAULTS["stop"].about)
    assert stopped.split()[-5] == "0", "no step is lost"
    assert stopped.endswith("yes, bit for bit")


def test_nodes_that_are_lost_twice_drained_or_cut_off_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["two", "drain", *(["cut"] if available() else [])]
    assert main(names) == 0
    rows = dict(zip(names, capsys.readouterr().out.splitlines()[-len(names) :], strict=True))
    for name, row in rows.items():
        assert row.startswith(FAULTS[name].about)
        assert row.endswith("yes, bit for bit")
    assert rows["drain"].split()[-5] == "0", "no step is lost"
