"""Quality over the global batch at equal epochs, by the rate's scaling rule: ``python -m benchmarks.batch``.

Generated scenes of nine chips of 8 LR pixels, SRCNN + PNN, one process. Each training runs ``satfusion train`` and is
measured by its last validation; the rates are those of ``scaled_rate``.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import rasterio
import torch
from torch.nn.functional import interpolate

from benchmarks.results import columns
from sharding.sources.synthetic.terrain import make_land

BASE = 8
"""Global batch whose rate is known."""
RULES = {"unscaled": 0.0, "sqrt": 0.5, "linear": 1.0}
"""Exponent of each rule: the rate grows with (batch / base) to its power."""
WARMUP = 0.05
"""Share of the steps that warm up."""
CHIPS = 9
"""Chips of a scene."""
SHARD = (
    *("--source", "scenes", "--revisits", "2", "--chip", "8", "--workers", "1"),
    *("--splits", "seeded", "--fractions", "0.8,0.1,0.1"),
)
"""Options of `satfusion shard` for the generated scenes."""
FINE, PAN, LR = 150, 75, 24
"""Sides of the generated land, of PAN and of a revisit, px."""
SCENES_TOML = """[revisits]
files = "{scene}/revisit_{revisit}.tif"
bands = ["red", "green", "blue"]
order = ["red", "green", "blue"]
scale = 0.0001
[pan]
files = "{scene}/pan.tif"
scale = 0.0001
[target]
files = "{scene}/target.tif"
order = ["red", "green", "blue"]
scale = 0.0001
"""


def scaled_rate(rate: float, batch: int, rule: str) -> float:
    """Return the learning rate for a global batch from the one for `BASE`."""
    return float(rate * (batch / BASE) ** RULES[rule])


def write_scenes(folder: Path, count: int, seed: int) -> None:
    """Write scenes of two noisy revisits that lie up to half an LR pixel apart, a PAN and a target, and scenes.toml."""
    for number in range(count):
        scene = folder / f"scene-{number:03d}"
        scene.mkdir(parents=True)
        random = np.random.default_rng([seed, number])
        land = torch.from_numpy(make_land(random, FINE + 8).bands[:3]).float()[None]
        inner = land[..., 4:-4, 4:-4]
        _write(scene / "pan.tif", interpolate(inner, size=(PAN, PAN), mode="area")[0].mean(0, keepdim=True))
        _write(scene / "target.tif", interpolate(inner, size=(PAN, PAN), mode="area")[0])
        for revisit in range(2):
            row, column = random.integers(1, 8, 2)
            moved = land[..., row : row + FINE, column : column + FINE]
            low = interpolate(moved, size=(LR, LR), mode="area")[0]
            noise = torch.from_numpy(random.normal(0, 0.004, low.shape)).float()
            _write(scene / f"revisit_{revisit}.tif", low + noise)
    (folder / "scenes.toml").write_text(SCENES_TOML)


def _write(path: Path, image: torch.Tensor) -> None:
    """Write [C, H, W] reflectance as uint16 steps of 1e-4."""
    values = (image.clamp(0, 1) * 10_000).round().numpy().astype(np.uint16)
    bands, height, width = values.shape
    shape = {"count": bands, "height": height, "width": width, "dtype": "uint16"}
    with rasterio.open(path, "w", driver="GTiff", **shape) as file:
        file.write(values)


def run(*words: str) -> None:
    """Run ``satfusion``; its output is shown if it fails."""
    command = [sys.executable, "-m", "cluster.cli", *words]
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"satfusion {words[0]} failed: {done.stdout[-2000:]}")


def train(data: Path, folder: Path, batch: int, rule: str, options: argparse.Namespace) -> list[str]:
    """Train and return a row: batch, rule, rate, steps, and loss and PSNR of the last validation."""
    rate = scaled_rate(options.rate, batch, rule)
    steps = options.epochs * (count_chips(data) // batch)
    run(
        *("train", "srcnn_pnn", f"data.uri={data}", f"output.uri={folder}", "output.panels=0"),
        *("model.hidden=8", "model.revisits=2", "train.engine=torch", "train.threads_per_rank=1"),
        *(f"train.epochs={options.epochs}", f"train.global_batch={batch}", f"train.learning_rate={rate!r}"),
        *(f"train.warmup_steps={max(1, round(WARMUP * steps))}", f"train.seed={options.seed}"),
    )
    with (folder / "metrics.csv").open(newline="") as file:
        last = [row for row in csv.DictReader(file) if row["val/psnr"]][-1]
    shown = [f"{float(last[name]):.{digits}f}" for name, digits in (("val/loss", 4), ("val/psnr", 2))]
    row = [str(batch), rule, f"{rate:.3g}", last["step"], *shown]
    print(*row, flush=True)
    return row


def count_chips(data: Path) -> int:
    """Return the number of chips of the training split."""
    index = json.loads((data / "index.json").read_text())
    return CHIPS * sum(len(shard["samples"]) for shard in index["splits"]["train"])


def main() -> None:
    """Generate, train each batch and rule, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=36, help="generated scenes, of which five in six train")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3, help=f"rate at a global batch of {BASE}")
    parser.add_argument("--seed", type=int, default=1, help="of weights and order; the scenes stay the same")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, of one thread each")
    options = parser.parse_args()
    cases = [(batch, rule) for batch in options.batches for rule in RULES if batch != BASE or rule == "unscaled"]
    with tempfile.TemporaryDirectory(prefix="batch-") as name, ThreadPoolExecutor(options.jobs) as pool:
        folder, data = Path(name), Path(name) / "data"
        write_scenes(folder / "scenes", options.scenes, seed=1)
        run("shard", "--input", str(folder / "scenes"), "--output", str(data), *SHARD)
        rows = list(pool.map(lambda case: train(data, folder / f"{case[0]}-{case[1]}", *case, options), cases))
    print("\n".join(columns([["batch", "rule", "rate", "steps", "loss", "PSNR, dB"], *rows])))


if __name__ == "__main__":
    main()
