"""Position of a trained network's image: the offset to HR with centred and with published registration.

``python -m benchmarks.offsets WORLDSTRAT --output FOLDER`` shards the six sample AOIs (seeded split, 4/1/1) and six
generated ones whose HR and PAN lie off the revisits by a known amount, trains SRCNN+PNN and HighRes-net alone on each
with either registration, prints a table and draws a picture. The networks are narrow and run under 16-bit autocast, so
that two cores take half an hour. A run that exists in FOLDER is not trained again.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.phase import offset
from pipeline.config import RunConfig, load_config
from pipeline.data import ChipDataset, evaluation_batches
from pipeline.evaluation.baselines import baselines
from pipeline.networks import load_network
from pipeline.quality.registration import MODES, Mode
from pipeline.training.checkpoint import read_checkpoint, select_checkpoint
from pipeline.training.loop import run_training
from sharding.picture import robust_high, sheet, to_rgb8
from sharding.prepare.options import HR_SIZE
from sharding.run.dataset import ShardOptions, shard_folder
from sharding.run.plan import PlanOptions
from sharding.sources.synthetic.rasters import HR_SIDE, write_worldstrat
from sharding.storage import open_storage

MODELS = {"SRCNN + PNN": ("srcnn", "pnn"), "HighRes-net alone": ("highresnet", "none")}
GENERATED_OFFSET = (1.5, -1.0)
"""Rows and columns by which HR and PAN of the generated scenes are shifted from the revisits, HR pixels."""
GENERATED_SEED = 5
CROP, ENLARGED = 40, 8
"""Side of the picture's crops, pixels, and their enlargement."""


@dataclass(frozen=True)
class Measured:
    """Offsets of one trained network on the test chips."""

    offsets: NDArray[np.float64]
    """(dy, dx) of the fused image to HR by chip, HR pixels: positive if it shows the land further down and right than
    HR."""
    data: NDArray[np.float64]
    """The same for the revisits' median, enlarged: the offset within the data."""
    fused: Tensor
    """The picture's chip [C, H, W]."""
    hr: Tensor
    """Its target."""

    def row(self) -> str:
        """Return the medians over the chips: dy, dx, length, length without the data's own offset, data."""
        dy, dx = np.median(self.offsets, axis=0)
        lengths = [float(np.median(np.hypot(*way.T))) for way in (self.offsets, self.offsets - self.data)]
        own_dy, own_dx = np.median(self.data, axis=0)
        return f"{dy:+.2f} | {dx:+.2f} | {lengths[0]:.2f} | {lengths[1]:.2f} | ({own_dy:+.2f}, {own_dx:+.2f})"


def make_datasets(worldstrat: Path, output: Path) -> dict[str, Path]:
    """Shard both sources unless that was done; return the datasets by name."""
    generated = output / "generated"
    if not generated.is_dir():
        off = (GENERATED_OFFSET[0] * HR_SIDE / HR_SIZE, GENERATED_OFFSET[1] * HR_SIDE / HR_SIZE)
        write_worldstrat(generated, 6, GENERATED_SEED, offset=off)
    datasets = {}
    for name, source in (("real", worldstrat), ("generated", generated)):
        datasets[name] = output / f"{name}-dataset"
        if not (datasets[name] / "index.json").exists():
            # Not the published split: its test AOI here is under snow, from which a network without PAN makes no image.
            shard_folder(
                source, open_storage(datasets[name]), ShardOptions(plan=PlanOptions(splits="seeded")), workers=1
            )
    return datasets


def configure(dataset: Path, run: Path, model: str, mode: Mode, options: argparse.Namespace) -> RunConfig:
    """Return the run's configuration."""
    encoder, head = MODELS[model]
    overrides = [
        f"data.uri={dataset}",
        "data.random_windows=true",
        f"output.uri={run}",
        "output.panels=0",
        f"model.encoder={encoder}",
        f"model.head={head}",
        f"model.hidden={options.hidden}",
        f"loss.registration={mode}",
        f"train.max_steps={options.steps}",
        "train.epochs=1000",
        "train.global_batch=8",
        "train.schedule=warmup_cosine",
        "train.warmup_steps=10",
        "train.learning_rate=1e-3",
        "train.clip_norm=1.0",
        "train.precision=bf16",
        f"train.threads_per_rank={options.threads}",
    ]
    return load_config("srcnn_pnn", overrides)


@torch.no_grad()
def measure(run: Path, drawn_chip: int) -> Measured:
    """Return the offsets of the run's last weights on the test split."""
    checkpoint = read_checkpoint(open_storage(run), select_checkpoint(open_storage(run), "last"))
    network = load_network(checkpoint).eval()
    dataset = ChipDataset(checkpoint.config.data.uri, "test", checkpoint.config.data)
    offsets, data, images = [], [], {}
    for batch, _ in evaluation_batches(dataset):
        fused = network(batch.lr, batch.pan, batch.revisit).fused
        offsets.append(offset(fused[0], batch.hr[0]))
        data.append(offset(baselines(batch)["bicubic_median"][0], batch.hr[0]))
        images[batch.chips[0]] = fused[0], batch.hr[0]
    return Measured(np.array(offsets), np.array(data), *images[drawn_chip])


def draw(results: dict[tuple[str, str, Mode], Measured]) -> Image.Image:
    """Draw a row for each dataset and model: HR, and the fused images with the median offset as an arrow to scale."""
    rows = []
    for source, model in dict.fromkeys((source, model) for source, model, _ in results):
        by_mode = {mode: results[source, model, mode] for mode in MODES}
        hr = by_mode["centred"].hr.numpy()
        y, x = busiest(hr)
        high = robust_high(hr)

        def tile(image: Tensor, arrow: NDArray[np.float64] | None, y=y, x=x, high=high) -> NDArray[np.uint8]:
            pixels = to_rgb8(image[:, y : y + CROP, x : x + CROP].numpy(), high=high)
            return marked(pixels, arrow)

        row = [(f"{source}, {model}: HR", tile(by_mode["centred"].hr, None))]
        for mode, measured in by_mode.items():
            middle = np.median(measured.offsets, axis=0)
            label = f"fused, {mode}: ({middle[0]:+.2f}, {middle[1]:+.2f}) px"
            row.append((label, tile(measured.fused, middle)))
        rows.append(row)
    return sheet(rows)


def busiest(image: NDArray[np.floating]) -> tuple[int, int]:
    """Return the first row and column of the CROP x CROP window with the highest contrast, away from the border."""
    starts = range(8, image.shape[-1] - CROP - 8, 4)
    return max(
        ((y, x) for y in starts for x in starts),
        key=lambda place: float(
            image[:, place[0] : place[0] + CROP, place[1] : place[1] + CROP].std(axis=(1, 2)).sum()
        ),
    )


def marked(pixels: NDArray[np.uint8], arrow: NDArray[np.float64] | None) -> NDArray[np.uint8]:
    """Enlarge a crop, mark its middle with a cross of hairlines, and draw an arrow from there, to scale."""
    side = CROP * ENLARGED
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
    canvas = ImageDraw.Draw(image)
    middle = side // 2
    canvas.line([(0, middle), (side, middle)], fill=(0, 255, 255))
    canvas.line([(middle, 0), (middle, side)], fill=(0, 255, 255))
    if arrow is not None:
        dy, dx = arrow * ENLARGED
        tip = (middle + dx, middle + dy)
        canvas.line([(middle, middle), tip], fill=(255, 255, 0), width=3)
        canvas.ellipse([tip[0] - 3, tip[1] - 3, tip[0] + 3, tip[1] + 3], fill=(255, 0, 0))
    return np.asarray(image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worldstrat", type=Path, help="folder of the six sample AOIs")
    parser.add_argument("--output", type=Path, required=True, help="folder of datasets and runs")
    parser.add_argument("--picture", type=Path, default=Path("docs/offsets.png"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chip", type=int, default=4, help="test chip that is drawn")
    options = parser.parse_args()
    results: dict[tuple[str, str, Mode], Measured] = {}
    print("| Data | Model | Registration | dy | dx | offset | less the data's | data's own |", flush=True)
    print("|---|---|---|---|---|---|---|---|")
    for source, dataset in make_datasets(options.worldstrat, options.output).items():
        for model in MODELS:
            for mode in MODES:
                run = options.output / f"{source}-{'-'.join(MODELS[model])}-{mode}-{options.hidden}-{options.steps}"
                run_training(configure(dataset, run, model, mode, options))
                measured = results[source, model, mode] = measure(run, options.chip)
                print(f"| {source} | {model} | {mode} | {measured.row()} |", flush=True)
    draw(results).save(options.picture)


if __name__ == "__main__":
    main()
