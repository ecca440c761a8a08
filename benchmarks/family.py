"""Time and memory of every encoder and head, forward and backward, on a GPU if there is one.

``python -m benchmarks.family`` trains each stage alone (``--pairs`` all 41 models), in float32 or under bfloat16
autocast. On CUDA the memory is the allocator's peak during the step, on CPU what autograd keeps in float32
(`models.cost`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from models.config import ModelConfig
from models.cost import cost
from models.registry import ABSENT, all_pairs, build_model
from models.satfusion import Fusion, SatFusion

LR, HR = 50, 156


def seconds(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """Return the median wall time of ``work`` after one warm-up call."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def measure(config: ModelConfig, device: torch.device, options: argparse.Namespace) -> str:
    """Return a line: milliseconds forward, forward and backward, and MiB."""
    torch.manual_seed(0)
    model: SatFusion = build_model(config).to(device)
    lr = torch.rand(options.batch, config.revisits, config.bands, LR, LR, device=device)
    pan = torch.rand(options.batch, 1, HR, HR, device=device)

    def forward() -> Fusion:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            fusion: Fusion = model(lr, pan)
        return fusion

    def step() -> None:
        model.zero_grad(set_to_none=True)
        forward().fused.float().square().mean().backward()

    with torch.no_grad():
        alone = seconds(device, forward, options.repeats)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    whole = seconds(device, step, options.repeats)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients), "a gradient is not finite"
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated(device) / 2**20:12.0f}"
    elif options.precision == "fp32":
        memory = f"{options.batch * cost(config, (LR, LR), (HR, HR)).activation_bytes / 2**20:12.0f}"
    else:
        memory = f"{'-':>12}"
    return f"{1000 * alone:12.1f}{1000 * whole:20.1f}{memory}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--pairs", action="store_true", help="all 41 models")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device}, {torch.get_num_threads()} threads, batch {options.batch}, {options.precision}, {LR} -> {HR} px")
    print(f"{'model':24}{'forward, ms':>12}{'and backward, ms':>20}{'MiB':>12}")
    for encoder, head in all_pairs():
        if options.pairs or ABSENT in (encoder, head):
            line = measure(ModelConfig(encoder, head), device, options)
            print(f"{encoder + '+' + head:24}{line}", flush=True)


if __name__ == "__main__":
    main()
