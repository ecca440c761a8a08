"""Weak scaling: measured here for 1 and 2 ranks, predicted for 8 to 1,024 GPUs: ``python -m benchmarks.scaling``.

The prediction adds stated terms (`Numbers`). Each number was measured in this project, is cited, or is called an
assumption. No GPU has measured any of it.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from benchmarks.batch import SHARD, run, write_scenes
from benchmarks.order import reads
from benchmarks.results import columns
from benchmarks.scaling_plot import draw
from models.config import ModelConfig
from models.cost import cost
from pipeline.order import CHIPS_PER_SCENE, Shuffle, epoch_batches
from sharding.prepare.options import SampleOptions

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Numbers of GPUs."""
NETWORKS = (("none", "pnn"), ("srcnn", "arconv"))
"""Encoder and head of the networks with the fewest operations and with the most parameters."""
SETTINGS = ("defaults", "lanes", "cache")
"""Scenes from the store with the default shuffle; with a lane for each GPU (``data.lanes`` = GPUs,
``data.shuffle_window=1``); and with the default shuffle from the nodes' disks (``data.cache_dir``, after one epoch)."""
CHIPS_PER_RANK, STEPS, SKIPPED = 16, 16, 4
"""Of a measurement: chips of a rank and step, steps, and those before it counts."""


@dataclass(frozen=True)
class Numbers:
    """Numbers of the model; each field says where it comes from."""

    chips_per_gpu: int = 8
    """Chips of a GPU and step. Assumption."""
    peak_flops: float = 67e12
    """Operations a second of an H100 SXM in float32. NVIDIA's data sheet."""
    efficiency: float = 0.3
    """Share of the peak that the networks reach. Assumption."""
    gpus_per_node: int = 8
    """GPUs of a node. NVIDIA's DGX H100 data sheet, like the next two."""
    node_bytes: float = 450e9
    """Bytes a second that a GPU sends to others of its node (NVLink)."""
    wire_bytes: float = 50e9
    """Bytes a second that a GPU sends to other nodes: an adapter of 400 Gb/s each."""
    hop_seconds: float = 10e-6
    """Latency of one message. Assumption."""
    bucket_bytes: float = 25 * 2**20
    """Bytes of gradients that are reduced together. PyTorch's default."""
    store_read_seconds: float = 1 / 1257
    """Time of a rank to read a chip from S3 when each scene is read once. docs/experiments.md, "The loader beside
    floors and others": two cores, first epoch. One core read 1,338, so more cores are not counted as faster."""
    cache_read_seconds: float = 1 / 11066
    """The same from the disk cache."""
    convert_seconds: float = 1 / 2878 - 1 / 11379
    """Time of a rank to make floats of a chip: from files up to floats, less from files alone. Same place."""
    store_bytes: float = 100e9 / 8
    """Bytes a second of the store for all readers: 100 Gb/s. Assumption."""
    sample_bytes: int = SampleOptions().sample_bytes
    """Bytes of a scene in a shard. The format."""
    shards: int = 156
    """Shards of WorldStrat's training split: 80 % of 3,889 AOIs, as wholly filled shards."""
    scenes_per_shard: int = 20
    """Scenes of a shard."""
    copy_bytes: float = 25e9
    """Bytes a second from a GPU to the host. Assumption: PCIe 5.0 x16, less than half of its rate."""
    upload_bytes: float = 50e6
    """Bytes a second of a checkpoint's upload. Assumption."""
    gpu_hours: float = 54 * 24 * 16_384 / 419
    """Hours of one GPU between failures that end a job: 419 in 54 days of 16,384 GPUs. "The Llama 3 Herd of Models",
    arXiv 2407.21783, section 3.3.4."""
    restart_seconds: float = 131.7
    """Seconds from the loss of a rank's node to further steps. docs/experiments.md, "Elastic jobs and faults", drill
    `lost`, on two overloaded cores."""


@dataclass(frozen=True)
class Network:
    """Costs of a network."""

    name: str
    """Encoder and head."""
    parameters: int
    """Trainable parameters."""
    flops: float
    """Operations of a forward pass of a chip."""


@dataclass(frozen=True)
class Prediction:
    """Times of a step in seconds, by term, and what follows."""

    compute: float
    """Forward and backward pass."""
    all_reduce: float
    """Sum of the gradients over all GPUs, after the backward pass."""
    loader: float
    """Preparation of a rank's chips, meanwhile."""
    store: float
    """Bytes of all ranks through the store, meanwhile."""
    checkpoint_every: float
    """Best seconds between checkpoints."""
    effective: float
    """Share of time that is not lost to checkpoints and failures."""
    reads: float
    """Scenes read by all ranks in an epoch, of the scenes that there are."""
    steps: int
    """Steps of an epoch."""

    @property
    def step(self) -> float:
        """Return the seconds of a step, with its share of what is lost."""
        return max(self.compute + self.all_reduce, self.loader, self.store) / self.effective

    @property
    def efficiency(self) -> float:
        """Return the share of the step in which the GPUs compute: the efficiency of weak scaling."""
        return self.compute / self.step

    @property
    def bottleneck(self) -> str:
        """Return the term that costs the most time beside compute; "compute" if that takes 95 % of the step."""
        busy = self.compute + self.all_reduce
        lost = {
            "all-reduce": self.all_reduce,
            "loader": self.loader - busy,
            "store": self.store - busy,
            "failures": self.step * (1 - self.effective),
        }
        return "compute" if self.efficiency >= 0.95 else max(lost, key=lambda term: lost[term])


def network(encoder: str, head: str) -> Network:
    """Return a network's costs for WorldStrat's chips."""
    found = cost(ModelConfig(encoder, head), (50, 50), (156, 156))
    return Network(f"{encoder} + {head}", found.parameters, found.flops)


def all_reduce_seconds(weights: float, gpus: int, numbers: Numbers) -> float:
    """Return the seconds to sum gradients of ``weights`` bytes: rings in each node, then between the nodes.

    A ring of n sends 2 (n - 1) / n of the bytes. Between nodes each GPU sends its own part. Latencies are those of a
    tree, once a bucket.
    """
    inner = min(gpus, numbers.gpus_per_node)
    nodes = gpus / inner
    within = 2 * (inner - 1) / inner * weights / numbers.node_bytes
    between = 2 * (nodes - 1) / nodes * weights / inner / numbers.wire_bytes
    buckets = math.ceil(weights / numbers.bucket_bytes)
    return within + between + buckets * 2 * math.log2(gpus) * numbers.hop_seconds


def failures(copy: float, upload: float, gpus: int, numbers: Numbers) -> tuple[float, float]:
    """Return the best seconds between checkpoints and the effective share of time, after Young and Daly.

    With a failure every M seconds, a stall of d seconds a checkpoint and R seconds to restart, the interval
    sqrt(2 d M) loses the least (Young 1974, doi 10.1145/361147.361115; Daly 2006, doi 10.1016/j.future.2004.11.016). It
    is not shorter than an upload. Lost are d / interval + (interval / 2 + R) / M.
    """
    between = numbers.gpu_hours * 3600 / gpus
    interval = max(math.sqrt(2 * copy * between), upload)
    lost = copy / interval + (interval / 2 + numbers.restart_seconds) / between
    return interval, 1 - lost


@cache
def read_share(readers: int, batch: int, shards: int, scenes: int, shuffle: Shuffle) -> float:
    """Return the scenes that all readers read in an epoch, as a share of those it takes: the order's own numbers."""
    batches = epoch_batches([scenes] * shards, "digest", 1, 0, batch, shuffle)
    return reads(batches, readers, CHIPS_PER_SCENE) / (batches.size / CHIPS_PER_SCENE)


def predict(net: Network, gpus: int, numbers: Numbers, setting: str) -> Prediction:
    """Return the times of a step on ``gpus`` GPUs with one of `SETTINGS`."""
    cached = setting == "cache"
    n = numbers
    batch = n.chips_per_gpu * gpus
    shuffle = Shuffle(1, gpus) if setting == "lanes" else Shuffle()
    share = read_share(gpus, batch, n.shards, n.scenes_per_shard, shuffle)
    read = share * (n.cache_read_seconds if cached else n.store_read_seconds)
    weights = 4.0 * net.parameters
    # Weights and Adam's two moments.
    interval, effective = failures(3 * weights / n.copy_bytes, 3 * weights / n.upload_bytes, gpus, n)
    return Prediction(
        compute=3 * net.flops * n.chips_per_gpu / (n.peak_flops * n.efficiency),
        all_reduce=all_reduce_seconds(weights, gpus, n),
        loader=n.chips_per_gpu * (read + n.convert_seconds),
        store=0.0 if cached else share * batch / CHIPS_PER_SCENE * n.sample_bytes / n.store_bytes,
        checkpoint_every=interval,
        effective=effective,
        reads=share,
        steps=n.shards * n.scenes_per_shard * CHIPS_PER_SCENE // batch,
    )


def measure(ranks: int, data: Path, folder: Path) -> float:
    """Train over gloo with one thread a rank, and return the median of chips a second."""
    sizes = (f"train.global_batch={CHIPS_PER_RANK * ranks}", f"train.max_steps={STEPS}", "train.epochs=1000")
    model = ("model.hidden=8", "model.revisits=2", "train.engine=torch", "train.threads_per_rank=1", "output.panels=0")
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    words = ("-m", "cluster.cli", "train", "srcnn_pnn", f"data.uri={data}", f"output.uri={folder}", *model, *sizes)
    done = subprocess.run(
        [sys.executable, *launcher, *words], check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise RuntimeError(f"the training of {ranks} ranks failed: {done.stdout[-2000:]}")
    with (folder / "metrics.csv").open(newline="") as file:
        rates = [float(row["time/chips_per_second"]) for row in csv.DictReader(file)]
    return statistics.median(rates[SKIPPED:])


def measure_here(rounds: int) -> None:
    """Print chips a second of 1 and 2 ranks on this machine, in turn."""
    if not rounds:
        return
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        folder, data = Path(name), Path(name) / "data"
        write_scenes(folder / "scenes", 12, seed=1)
        run("shard", "--input", str(folder / "scenes"), "--output", str(data), *SHARD)
        for number in range(rounds):
            one, two = (measure(ranks, data, folder / f"run-{number}-{ranks}") for ranks in (1, 2))
            print(f"1 rank {one:.2f}, 2 ranks {two:.2f} chips/s: efficiency {two / one / 2:.0%}", flush=True)


def table(numbers: Numbers) -> str:
    """Return the predictions as text."""
    rows = [["network", "GPUs", "setting", "compute", "all-reduce", "loader", "store", "step, ms"]]
    rows[0] += ["efficiency", "bottleneck", "checkpoint, s", "effective", "reads", "steps"]
    for pair in NETWORKS:
        net = network(*pair)
        for setting in SETTINGS:
            for gpus in SIZES:
                p = predict(net, gpus, numbers, setting)
                terms = [f"{1e3 * value:.2f}" for value in (p.compute, p.all_reduce, p.loader, p.store, p.step)]
                rest = [f"{p.checkpoint_every:.0f}", f"{p.effective:.2%}", f"{p.reads:.2f}", str(p.steps)]
                rows.append([net.name, str(gpus), setting, *terms, f"{p.efficiency:.0%}", p.bottleneck, *rest])
    return "\n".join(columns(rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict, measure if asked to, and print both."""
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=__doc__)
    parser.add_argument("--rounds", type=int, default=0, help="measurements of 1 and 2 ranks here (default none)")
    parser.add_argument(
        "--efficiency", type=float, default=Numbers.efficiency, help="of the peak (default %(default)s)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the efficiency")
    args = parser.parse_args(arguments)
    numbers = replace(Numbers(), efficiency=args.efficiency)
    print(table(numbers))
    if args.plot:
        lines = {
            f"{' + '.join(pair)}, {setting}": [
                predict(network(*pair), gpus, numbers, setting).efficiency for gpus in SIZES
            ]
            for pair in NETWORKS
            for setting in SETTINGS
        }
        draw(args.plot, SIZES, lines)
    measure_here(args.rounds)


if __name__ == "__main__":
    main()
