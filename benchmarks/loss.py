"""Time of the loss, forward and backward, and of its search over 81 shifts: ``python -m benchmarks.loss``."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from models.satfusion import Fusion
from pipeline.quality.losses import LossConfig, fusion_loss
from pipeline.quality.metrics import image_metrics
from pipeline.quality.registration import register


def milliseconds(work: Callable[[], object], repeats: int = 9) -> float:
    """Return the median wall time of ``work`` after two warm-up calls."""
    times = []
    for _ in range(repeats + 2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=156)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = torch.rand(options.batch, 3, options.size, options.size, device=device)
    prediction = torch.rand_like(target).requires_grad_()
    config = LossConfig()

    def step() -> None:
        fusion_loss(Fusion(prediction, None, None), target, config).total.mean().backward()

    print(f"{device}, {torch.get_num_threads()} threads, batch {options.batch}, 3 x {options.size} x {options.size}")
    print(f"loss, forward and backward {milliseconds(step):8.1f} ms")
    print(f"of it the registration     {milliseconds(lambda: register(prediction, target)):8.1f} ms")
    print(f"metrics, raw and adjusted  {milliseconds(lambda: image_metrics(prediction, target)):8.1f} ms")


if __name__ == "__main__":
    main()
