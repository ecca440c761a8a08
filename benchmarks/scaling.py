"""Weak scaling: measured for 1 and 2 ranks, predicted for 8 to 1,024 GPUs: ``python -m benchmarks.scaling``.

The prediction is a sum of stated terms (`predict`) of stated numbers (`Numbers`), each measured in this project, cited
or assumed. No GPU has measured it: it says which term grows first, not how fast a GPU is.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.results import columns
from models.config import ModelConfig
from models.cost import cost
from models.registry import all_pairs, build_model
from sharding.prepare.options import SampleOptions
from sharding.run.dataset import shard_folder
from sharding.run.job import ShardOptions
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import open_storage

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Numbers of GPUs."""
LR, PAN = (50, 50), (156, 156)
"""Sides of WorldStrat's chips, pixels."""
STEPS, SKIPPED, ROUNDS = 16, 4, 3
"""Steps of a measurement, those before it counts, and measurements of each number of ranks."""
FEWEST_STEPS = 50
"""Steps that an epoch should have: with fewer, the batch and not the hardware limits what training learns."""
CHANGES = {
    "compute": "bf16, compile, channels_last",
    "all-reduce": "more chips a GPU, or fewer GPUs",
    "loader": "more cores a GPU",
    "store": "only in the first epoch: data.cache_dir, or a faster store",
    "checkpoints": "a larger train.checkpoint_every",
    "failures": "a smaller train.checkpoint_every",
    "dataset": "fewer GPUs: an epoch has too few steps",
}
"""What to change where a term is the first bottleneck."""


@dataclass(frozen=True)
class Numbers:
    """Numbers of the model. Each field says where it comes from."""

    chips_per_gpu: int = 8
    """Chips of a GPU and step. Assumed."""
    flops_per_second: float = 67e12 * 0.3
    """Operations of a GPU a second: float32 peak of an H100 SXM (NVIDIA's data sheet), of which convolutions are
    assumed to reach 30 %."""
    bus_bytes: float = 50e9
    """Bytes a second between nodes for each GPU: an adapter of 400 Gb/s (NVIDIA's DGX H100 data sheet)."""
    hop_seconds: float = 10e-6
    """Latency of a hop of an all-reduce. Assumed."""
    chips_per_core: float = 870.0
    """Chips a second that a core reads from S3 (docs/experiments.md: filling from S3, one rank)."""
    cores: int = 6
    """Cores of a GPU (docs/deploy.md)."""
    chip_bytes: float = 3.45e6 / 9
    """Bytes of a chip in a shard: six AOIs of WorldStrat take 20.7 MB (docs/results.md), nine chips each."""
    store_bytes: float = 12.5e9
    """Bytes a second of the store, all readers together: 100 Gb/s. Assumed."""
    upload_bytes: float = 50e6
    """Bytes a second of a checkpoint's upload. Assumed."""
    copy_bytes: float = 25e9
    """Bytes a second from a GPU to page-locked memory: PCIe 4.0 x16, of which a fifth is assumed lost."""
    checkpoint_every: int = 500
    """Steps between checkpoints (the default)."""
    gpu_hours: float = 16_384 * 54 * 24 / 419
    """GPU hours between failures: 419 in 54 days of 16,384 GPUs (Llama Team, "The Llama 3 Herd of Models", arXiv
    2407.21783, section 3.3.4)."""
    restart_seconds: float = 41.9
    """Seconds from the loss of a rank to further steps (docs/experiments.md, drill ``rank``)."""
    chips: int = 3_111 * 9
    """Chips of WorldStrat's training split: 80 % of 3,889 AOIs."""


@dataclass(frozen=True)
class Prediction:
    """A step's times of one network on some GPUs, seconds."""

    terms: Mapping[str, float]
    """What the step takes beside the others: compute, all-reduce, loader, store, checkpoints, failures."""
    step: float
    """The step in all, from the second epoch on."""
    first_epoch_step: float
    """The step in the first epoch, in which chips come from the store."""
    steps_per_epoch: int
    """Steps of an epoch."""
    bottleneck: str
    """A key of `CHANGES`: the term that costs most beside compute, if it costs a tenth of the step; else compute."""

    @property
    def efficiency(self) -> float:
        """Return the share of the step in which the GPU computes."""
        return self.terms["compute"] / self.step


def predict(parameters: int, flops: int, gpus: int, n: Numbers) -> Prediction:
    """Predict the step of a network.

    Compute (a backward pass takes two forward passes) and a ring all-reduce of the gradient follow one another. Loader
    and store work meanwhile: the longest counts. A checkpoint holds the step while weights and moments are copied, and
    until the last one is uploaded if that takes longer than the interval. A failure costs a restart and half an
    interval (Young, "A first order approximation to the optimum checkpoint interval", 1974).

    Args:
        parameters: Trainable parameters.
        flops: Operations of a chip's forward pass.
        gpus: Number of GPUs, each with ``n.chips_per_gpu`` chips a step.
        n: The numbers.
    """
    chips = n.chips_per_gpu * gpus
    weights = 4.0 * parameters
    compute = 3.0 * flops * n.chips_per_gpu / n.flops_per_second
    reduce = 2 * (gpus - 1) / gpus * weights / n.bus_bytes + 2 * math.log2(gpus) * n.hop_seconds
    loader = n.chips_per_gpu / (n.chips_per_core * n.cores)
    store = chips * n.chip_bytes / n.store_bytes
    busy = compute + reduce
    steady = max(busy, loader)
    late = max(0.0, 3 * weights / n.upload_bytes - n.checkpoint_every * steady)
    checkpoints = (3 * weights / n.copy_bytes + late) / n.checkpoint_every
    lost = n.restart_seconds + n.checkpoint_every * (steady + checkpoints) / 2
    failures = (steady + checkpoints) * lost * gpus / (3600 * n.gpu_hours)
    step = steady + checkpoints + failures
    terms = {
        "compute": compute,
        "all-reduce": reduce,
        "loader": loader,
        "store": store,
        "checkpoints": checkpoints,
        "failures": failures,
    }
    costs = {**terms, "compute": 0.0, "loader": max(0.0, loader - busy), "store": max(0.0, store - steady)}
    worst = max(costs, key=lambda name: costs[name])
    bottleneck = worst if costs[worst] >= step / 10 else "compute"
    per_epoch = n.chips // chips
    return Prediction(
        terms=terms,
        step=step,
        first_epoch_step=step + max(0.0, store - steady),
        steps_per_epoch=per_epoch,
        bottleneck="dataset" if per_epoch < FEWEST_STEPS else bottleneck,
    )


def extremes() -> dict[str, tuple[int, int]]:
    """Return parameters and operations of the smallest and the largest network by parameters, by name."""
    with torch.device("meta"):
        sizes = {
            pair: sum(weight.numel() for weight in build_model(ModelConfig(*pair)).parameters()) for pair in all_pairs()
        }
    found = {
        pair: cost(ModelConfig(*pair), LR, PAN)
        for pair in (min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__))
    }
    return {" + ".join(pair): (of.parameters, of.flops) for pair, of in found.items()}


def measure(ranks: int, data: Path, folder: Path) -> float:
    """Train with four chips a rank over gloo, one thread a rank, and return the median of chips a second."""
    keys = ("model.hidden=16", "model.revisits=2", "train.threads_per_rank=1", "output.panels=0", "train.epochs=1000")
    sizes = (f"train.global_batch={4 * ranks}", f"train.max_steps={STEPS}", f"data.uri={data}", f"output.uri={folder}")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, "-m", "cluster.cli", "train", "srcnn_pnn", *keys, *sizes]
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"the training of {ranks} ranks failed: {done.stdout[-2000:]}")
    with (folder / "metrics.csv").open(newline="") as file:
        rates = [float(row["time/chips_per_second"]) for row in csv.DictReader(file)]
    return statistics.median(rates[SKIPPED:])


def measured() -> list[str]:
    """Return lines with chips a second of 1 and 2 ranks on this machine, in turn."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        folder = Path(name)
        write_worldstrat(folder / "source", 8, seed=1, revisits=2, hr_side=80)
        options = ShardOptions(SampleOptions(revisits=2))
        shard_folder(folder / "source", open_storage(folder / "data"), options, workers=1)
        for number in range(ROUNDS):
            for ranks, found in rates.items():
                found.append(measure(ranks, folder / "data", folder / f"run-{ranks}-{number}"))
    one, two = (statistics.median(found) for found in rates.values())
    shares = ", ".join(f"{b / a / 2:.0%}" for a, b in zip(*rates.values(), strict=True))
    return [
        f"1 rank here: {one:.2f} chips/s; 2 ranks: {two:.2f} chips/s",
        f"weak scaling of the rounds: {shares} of twice one rank's rate",
    ]


def plot(lines: Mapping[str, Sequence[float]]) -> str:
    """Return an SVG of shares over `SIZES`, a line for each name."""
    left, top, width, height = 60, 20, 480, 240
    step = width / (len(SIZES) - 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 100} {height + 100}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = top + height * (1 - share)
        parts.append(f'<path d="M{left} {y}h{width}" stroke="#ccc"/><text x="20" y="{y + 4}">{share:.0%}</text>')
    for place, gpus in enumerate(SIZES):
        parts.append(f'<text x="{left + place * step - 10:.0f}" y="{top + height + 18}">{gpus}</text>')
    parts.append(f'<text x="{left}" y="{top + height + 36}">GPUs; share of the step in compute, predicted</text>')
    for number, ((name, shares), colour) in enumerate(zip(lines.items(), ("#06c", "#c40"), strict=True)):
        points = " ".join(f"{left + i * step:.1f},{top + height * (1 - share):.1f}" for i, share in enumerate(shares))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{left}" y="{top + height + 54 + 16 * number}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, unless told not to, and predict; print both."""
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=__doc__)
    parser.add_argument("--predict-only", action="store_true", help="do not measure 1 and 2 ranks here")
    parser.add_argument(
        "--chips", type=int, default=Numbers.chips_per_gpu, help="chips of a GPU and step (%(default)s)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="also draw the share of compute")
    args = parser.parse_args(arguments)
    numbers = dataclasses.replace(Numbers(), chips_per_gpu=args.chips)
    for line in [] if args.predict_only else measured():
        print(line, flush=True)
    rows = [["network", "GPUs", "step ms", "first epoch ms", "in compute", "steps/epoch", "bottleneck", "change"]]
    lines = {}
    for name, (parameters, flops) in extremes().items():
        found = {gpus: predict(parameters, flops, gpus, numbers) for gpus in SIZES}
        lines[f"{name}, {parameters / 1e6:.2f} M parameters"] = [of.efficiency for of in found.values()]
        for gpus, of in found.items():
            times = (f"{1e3 * of.step:.2f}", f"{1e3 * of.first_epoch_step:.2f}", f"{of.efficiency:.0%}")
            rows.append([name, str(gpus), *times, str(of.steps_per_epoch), of.bottleneck, CHANGES[of.bottleneck]])
    print("\n".join(columns(rows)))
    if args.plot:
        args.plot.write_text(plot(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
