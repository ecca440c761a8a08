"""The arithmetic of the scaling benchmarks, by hand; nothing is timed."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.scaling import (
    SETTINGS,
    SIZES,
    Network,
    Numbers,
    all_reduce_seconds,
    failures,
    predict,
    read_share,
)
from benchmarks.scaling_plot import draw
from pipeline.order import Shuffle

SMALL = Numbers(shards=12, scenes_per_shard=8)
"""A split of which 64 GPUs still get a batch: 864 chips."""


def test_a_ring_in_the_node_and_one_between_nodes() -> None:
    numbers = replace(Numbers(), node_bytes=100.0, wire_bytes=10.0, hop_seconds=1.0, bucket_bytes=40.0)
    # Two GPUs: 2 x 1/2 of 80 bytes at 100 a second; two buckets of 2 x log2(2) hops.
    assert all_reduce_seconds(80.0, 2, numbers) == pytest.approx(0.8 + 4)
    # Four nodes of eight: 2 x 7/8 x 0.8 s, then 2 x 3/4 of each GPU's 10 bytes at 10 a second; 2 x 2 x 5 hops.
    assert all_reduce_seconds(80.0, 32, numbers) == pytest.approx(1.4 + 1.5 + 20)


def test_young_and_daly() -> None:
    numbers = replace(Numbers(), gpu_hours=8.0, restart_seconds=36.0)
    # Eight GPUs fail every 3,600 s: sqrt(2 x 2 x 3600) = 120 s; lost are 2/120 and (60 + 36)/3600.
    interval, effective = failures(copy=2.0, upload=1.0, gpus=8, numbers=numbers)
    assert interval == pytest.approx(120)
    assert effective == pytest.approx(1 - 1 / 60 - 96 / 3600)
    # An upload of 240 s is the shortest interval: 2/240 and (120 + 36)/3600.
    interval, effective = failures(copy=2.0, upload=240.0, gpus=8, numbers=numbers)
    assert (interval, effective) == (240, pytest.approx(1 - 1 / 120 - 156 / 3600))


def test_no_other_interval_loses_less() -> None:
    numbers, copy = Numbers(), 0.01
    interval, effective = failures(copy, 0.0, 1024, numbers)
    between = numbers.gpu_hours * 3600 / 1024
    for other in (0.5 * interval, 0.9 * interval, 1.1 * interval, 2 * interval):
        assert copy / other + (other / 2 + numbers.restart_seconds) / between > 1 - effective


def test_a_reader_alone_reads_each_scene_once() -> None:
    assert read_share(1, 8, 12, 8, Shuffle()) == 1
    # More readers than a scene has chips read it at most nine times, and a lane each spares reads.
    many = read_share(54, 432, 12, 8, Shuffle())
    assert read_share(54, 432, 12, 8, Shuffle(1, 54)) < many <= 9


def test_terms_of_a_step() -> None:
    numbers = replace(
        SMALL, peak_flops=100.0, efficiency=0.5, sample_bytes=90, store_bytes=10.0, hop_seconds=0.0, node_bytes=math.inf
    )
    numbers = replace(numbers, store_read_seconds=2.0, cache_read_seconds=0.5, convert_seconds=0.25)
    found = predict(Network("one", 1, 25.0), 1, numbers, "defaults")
    # 3 x 25 operations x 8 chips at 50 a second; 8 x (2 + 0.25) s; 8/9 of a scene's 90 bytes at 10 a second.
    assert (found.compute, found.loader, found.store) == pytest.approx((12, 18, 8))
    assert found.step == pytest.approx(18 / found.effective)
    assert found.bottleneck == "loader"
    assert found.steps == 864 // 8
    cached = predict(Network("one", 1, 25.0), 1, numbers, "cache")
    assert (cached.loader, cached.store) == pytest.approx((6, 0))
    assert cached.bottleneck == "compute"


@pytest.mark.parametrize("setting", SETTINGS)
def test_more_gpus_are_never_more_efficient(setting: str) -> None:
    net = Network("some", 10**6, 10.0**10)
    found = [predict(net, gpus, SMALL, setting) for gpus in SIZES if gpus * 8 <= 864]
    assert len(found) == 4
    for fewer, more in pairwise(found):
        assert more.compute == fewer.compute
        assert more.all_reduce > fewer.all_reduce
        assert more.effective < fewer.effective
        assert more.efficiency <= fewer.efficiency <= 1


def test_a_plot_has_each_line_in_its_colour(tmp_path: Path) -> None:
    draw(tmp_path / "plot.png", (8, 16), {"low": (0.1, 0.1), "high": (0.9, 0.9)})
    with Image.open(tmp_path / "plot.png") as image:
        low, high = (
            sum(image.getpixel((480, y)) == colour for y in range(30, 400))
            for colour in ((0x0B, 0x6E, 0x99), (0x5B, 0x8C, 0x2A))
        )
    assert low
    assert high
