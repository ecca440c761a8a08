"""Rate of ``predict`` beside the bare forward pass on the same windows: ``python -m benchmarks.predict``.

Both alternate in one process. Predict cuts, sends, fuses, blends and writes the GeoTIFF; the bare pass is given
windows of the same number and size, cut and on the device already.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from models.registry import build_model
from pipeline.config import load_config
from pipeline.prediction import Fusion
from pipeline.prediction.fusion import MICRO_BATCH
from pipeline.prediction.windows import plan_axis
from sharding.rasters.cog import RasterFacts, write_cog

RATIO = 3.125


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=500, help="side of PAN, px (default 500)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="of the recipe demo")
    options = parser.parse_args()
    network = build_model(load_config("demo", options.overrides).model)
    fusion = Fusion.of(network, "benchmark")
    device = next(network.parameters()).device
    side, low = options.side, round(options.side / RATIO)
    random = np.random.default_rng(0)
    lr = random.integers(0, 20_000, (network.config.revisits, 3, low, low), np.uint16)
    pan = random.integers(0, 20_000, (1, side, side), np.uint16)
    axis = plan_axis(low, side, fusion.window)
    # The windows differ in their pixels only: one row of them stands for all, and fits in memory.
    windows = [
        (
            torch.rand(len(part), *lr.shape[:2], fusion.window, fusion.window, device=device),
            torch.rand(len(part), 1, len(axis[0].weights), len(axis[0].weights), device=device),
        )
        for first in range(0, len(axis), MICRO_BATCH)
        for part in [axis[first : first + MICRO_BATCH]]
    ]

    @torch.no_grad()
    def bare() -> None:
        for _ in axis:
            for images in windows:
                network(*images)

    def predict(folder: str) -> None:
        facts = RasterFacts(side, side, ("red", "green", "blue"), "EPSG:32632", (1.5, 0, 0, 0, -1.5, 0))
        with write_cog(Path(folder, "scene.tif"), facts) as raster:
            for rows in fusion.stream(lr, pan, step=3e-5):
                raster.write(rows, np.ones(rows.shape[-2:], bool))

    times: dict[str, list[float]] = {"bare": [], "predict": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds + 1):
            both = {"bare": seconds(bare), "predict": seconds(lambda: predict(folder))}
            for name, value in both.items():
                if number:  # the first round warms up
                    times[name].append(value)
    megapixels = side**2 / 1e6
    print(f"{device}, {torch.get_num_threads()} threads, {side} x {side} px, {len(axis) ** 2} windows")
    for name, values in times.items():
        print(f"{name:8} {statistics.median(values) / megapixels:8.2f} s/megapixel")
    ratios = [bare / predict for bare, predict in zip(times["bare"], times["predict"], strict=True)]
    print(f"predict's rate is {statistics.median(ratios):.3f} of the bare forward pass's")


if __name__ == "__main__":
    main()
