"""The arithmetic of the scaling prediction."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.scaling import CHANGES, SIZES, Numbers, predict

ROUND = Numbers(
    chips_per_gpu=10,
    flops_per_second=1e12,
    bus_bytes=1e9,
    hop_seconds=1e-3,
    chips_per_core=100,
    cores=2,
    chip_bytes=1e6,
    store_bytes=1e9,
    upload_bytes=1e6,
    copy_bytes=1e9,
    checkpoint_every=100,
    gpu_hours=1,
    restart_seconds=36,
    chips=10_000,
)
"""Numbers that a person can compute with."""


def test_terms_by_hand() -> None:
    found = predict(parameters=250_000, flops=10**10, gpus=4, n=ROUND)
    # 4 GPUs: 1 MB of weights, twice 3/4 of them over 1 GB/s, and twice two hops of 1 ms.
    expected = {
        "compute": 0.3,
        "all-reduce": 0.0015 + 0.004,
        "loader": 0.05,
        "store": 0.04,
        "checkpoints": 3e6 / 1e9 / 100,
    }
    assert {name: found.terms[name] for name in expected} == pytest.approx(expected)
    running = 0.3055 + 3e-5
    # A failure each 900 s costs 36 s and half of 100 steps.
    assert found.terms["failures"] == pytest.approx(running * (36 + 50 * running) / 900)
    assert found.step == pytest.approx(running + found.terms["failures"])
    assert found.first_epoch_step == found.step
    assert found.steps_per_epoch == 250
    assert found.bottleneck == "compute"


@pytest.mark.parametrize(
    ("change", "bottleneck"),
    [
        ({"bus_bytes": 1e6}, "all-reduce"),
        ({"chips_per_core": 1.0}, "loader"),
        ({"store_bytes": 1e6}, "store"),
        ({"upload_bytes": 1e4}, "checkpoints"),
        ({"gpu_hours": 0.1}, "failures"),
        ({"chips": 1_000}, "dataset"),
    ],
)
def test_what_is_slow_is_named(change: dict[str, float], bottleneck: str) -> None:
    found = predict(250_000, 10**10, 4, dataclasses.replace(ROUND, **change))  # type: ignore[arg-type]
    assert found.bottleneck == bottleneck
    assert bottleneck in CHANGES


def test_more_gpus_never_take_a_shorter_step() -> None:
    steps = [predict(2_000_000, 10**11, gpus, Numbers()).step for gpus in SIZES]
    assert steps == sorted(steps)
