"""A lost node and a stopped job on real Ray nodes, by the drills' program."""

from __future__ import annotations

import pytest

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
