"""Scores of a checkpoint on a held-out split, beside two baselines without training."""

from __future__ import annotations

import csv
import io
import itertools
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import DataConfig
from pipeline.data import ChipDataset, evaluation_batches
from pipeline.data.batches import Batch
from pipeline.networks import load_network, load_published_network
from pipeline.quality.metrics import ADJUSTED, METRICS, image_metrics
from pipeline.quality.registration import Mode
from pipeline.reporting.panels import panel
from pipeline.training.checkpoint import read_checkpoint, select_checkpoint
from pipeline.training.validation import resolution_ratio
from sharding.errors import UserError
from sharding.format.entries import agreement_bin
from sharding.progress import progress
from sharding.storage import Storage, open_storage
from sharding.storage.lock import Lock

logger = logging.getLogger(__name__)

FUSED, AVERAGED = "fused", "fused_ema"
"""Methods of the weights, and of their moving average if the run keeps one (``train.ema``)."""
BASELINES = ("bicubic_clearest", "bicubic_median")
COLUMNS = tuple(name + suffix for suffix in ("", ADJUSTED) for name in METRICS)


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one checkpoint on one split."""

    checkpoint: str
    """Folder name of the checkpoint."""
    split: str
    """``train``, ``val`` or ``test``."""
    simulation: str
    """Mode of simulating revisits from the target, or ``off``."""
    registration: Mode
    """Mode of registering predictions to the target."""
    chips: list[dict[str, object]]
    """A row per chip and method: ``aoi chip method`` and COLUMNS."""
    methods: tuple[str, ...]
    """Methods in the order of the table: the fused images, then BASELINES."""
    folder: str
    """Folder of the CSVs and panels."""

    def means(self, method: str) -> dict[str, float]:
        """Return the mean of every column over the chips, for one method."""
        rows = [row for row in self.chips if row["method"] == method]
        return {column: _mean([row[column] for row in rows]) for column in COLUMNS}

    def margin(self, column: str) -> tuple[float, float]:
        """Return the mean of ``column`` for the fused image and for the better of the baselines (higher is better)."""
        return self.means(FUSED)[column], max(self.means(method)[column] for method in BASELINES)

    def table(self) -> str:
        """Return the table that the command prints: a line per method, raw then adjusted."""
        lines = [
            f"split {self.split}, checkpoint {self.checkpoint}, {self.registration} registration,"
            f"{'' if self.simulation == 'off' else f' simulated revisits ({self.simulation}),'}"
            f" {len(self.chips) // len(self.methods)} chips",
            f"{'':18}" + "".join(f"{name:>10}" for name in (*METRICS, *(f"{name}*" for name in METRICS))),
        ]
        for method in self.methods:
            means = self.means(method)
            lines.append(f"{method:18}" + "".join(f"{means[column]:>10.4g}" for column in COLUMNS))
        lines.append("* after bias adjustment to the truth's band means; psnr in dB, sam in degrees, ergas in percent")
        return "\n".join([*lines, *self._by_agreement()])

    def _by_agreement(self) -> Iterator[str]:
        """Yield a histogram of the AOIs' agreement, and the mean PSNR of each method by it."""
        known = [row for row in self.chips if row["agreement"] is not None]
        if not known:
            return
        yield "agreement of revisits with the target, correlation from: AOIs, and their mean psnr by method"
        yield f"{'':10}{'AOIs':>6}" + "".join(f"{method:>18}" for method in self.methods)
        known.sort(key=lambda row: cast(float, row["agreement"]))
        for name, rows in itertools.groupby(known, lambda row: agreement_bin(cast(float, row["agreement"]))):
            own = list(rows)
            aois = len({row["aoi"] for row in own})
            means = (_mean([row["psnr"] for row in own if row["method"] == method]) for method in self.methods)
            yield f"{name:10}{aois:>6}" + "".join(f"{mean:>18.4g}" for mean in means)


def evaluate_run(
    uri: str,
    split: str,
    which: str,
    *,
    data_uri: str = "",
    output: str = "",
    registration: Mode = "centred",
    panels: int = 9,
) -> Evaluation:
    """Evaluate a checkpoint of a run and write the metrics into a folder for its split and checkpoint.

    Args:
        uri: Run folder.
        split: Split of the dataset.
        which: ``best`` (least validation loss), ``last`` or a step.
        data_uri: Dataset; empty for the run's own.
        output: Folder or s3:// prefix above the results; empty for ``evaluation/`` in the run folder.
        registration: ``centred`` or ``published``.
        panels: Chips drawn as PNG, the first ones of the split.

    Raises:
        UserError: No such run, checkpoint or dataset.
    """
    run = open_storage(uri)
    checkpoint = read_checkpoint(run, select_checkpoint(run, which))
    networks = {FUSED: load_network(checkpoint)}
    if checkpoint.state.ema:
        networks[AVERAGED] = load_network(checkpoint, checkpoint.state.ema)
    # The nodes' disk cache is not on this machine, and every sample is read only once.
    data = replace(checkpoint.config.data, cache_dir="")
    dataset = ChipDataset(data_uri or data.uri, split, data)
    dataset.check_fits(checkpoint.config.model)
    name = _folder_name(checkpoint.name, dataset, registration)
    digest = dataset.index.digest
    if digest != checkpoint.position.index_digest:
        logger.warning(
            "%s is not the dataset that %s was trained on: its %s AOIs may be among the trained ones",
            dataset.storage.uri,
            checkpoint.name,
            dataset.split,
        )
        name += f"-{digest[:8]}"
    folder = open_storage(output).child(name) if output else run.child(f"evaluation/{name}")
    return _measure(networks, dataset, checkpoint.name, folder, registration, panels)


def evaluate_published(
    path: Path,
    pair: str,
    data_uri: str,
    split: str,
    output: str,
    *,
    simulate: str = "off",
    registration: Mode = "centred",
    panels: int = 9,
) -> Evaluation:
    """Evaluate a checkpoint of the published code, and write the metrics below the folder ``output``.

    Bands and revisits are the dataset's; width and zoom are the published ones.

    Args:
        path: The file, see `models.published.read_published`.
        pair: ``ENCODER+HEAD``.
        data_uri: Dataset.
        split: Split of the dataset.
        output: Folder or s3:// prefix.
        simulate: Mode of simulating revisits from the target, as the later published trainings and tests do; ``off``
            uses the dataset's.
        registration: ``centred`` or ``published``.
        panels: Chips drawn as PNG, the first ones of the split.

    Raises:
        UserError: The file is unreadable or of another model; no such model or dataset.
    """
    dataset = ChipDataset(data_uri, split, DataConfig(simulate=simulate))
    bands = len(dataset.index.facts.bands.lr)
    network = load_published_network(path, pair, bands=bands, revisits=dataset.revisits)
    dataset.check_fits(network.config)
    name = f"{network.config.encoder}+{network.config.head}-{path.stem}"
    folder = f"{_folder_name(name, dataset, registration)}-{dataset.index.digest[:8]}"
    return _measure({FUSED: network}, dataset, name, open_storage(output).child(folder), registration, panels)


def _measure(
    networks: Mapping[str, nn.Module],
    dataset: ChipDataset,
    name: str,
    folder: Storage,
    registration: Mode,
    panels: int,
) -> Evaluation:
    """Run the split through the networks, by method; replace the rows and panels in ``folder``.

    Raises:
        UserError: The folder cannot be written to, or another evaluation writes to it; nothing was computed.
    """
    with Lock(folder, "evaluate"):
        return _score(networks, dataset, name, folder, registration, panels)


def _score(
    networks: Mapping[str, nn.Module],
    dataset: ChipDataset,
    name: str,
    folder: Storage,
    registration: Mode,
    panels: int,
) -> Evaluation:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for network in networks.values():
        network.to(device).eval()
    methods = (*networks, *BASELINES)
    # Remove results of an earlier evaluation only: the folder may be the user's own.
    for stored in folder.list():
        if re.fullmatch(r"chips\.csv|aois\.csv|table\.txt|panel-\d+\.png", stored.key):
            folder.delete(stored.key)
    rows: list[dict[str, object]] = []
    with progress(dataset.num_chips, f"evaluating {name}", "chip") as bar:
        for number, (batch, counts) in enumerate(evaluation_batches(dataset, device=device)):
            bar.update()
            if not counts:
                logger.warning(
                    "skipped in the metrics: %s is quarantined or holds no data", dataset.chip_id(batch.chips[0])
                )
                continue
            with torch.no_grad():
                images = {
                    method: network(batch.lr, batch.pan, batch.revisit).fused.float()
                    for method, network in networks.items()
                }
            images |= baselines(batch)
            chip = batch.chips[0]
            for method in methods:
                metrics = image_metrics(images[method], batch.hr, registration, resolution_ratio(dataset), batch.valid)
                place: dict[str, object] = {
                    "aoi": dataset.aoi(chip),
                    "chip": chip % dataset.chips_per_scene,
                    "method": method,
                    "agreement": dataset.agreement(chip),
                }
                rows.append(place | {column: metrics[column].item() for column in COLUMNS})
            if number < panels:
                _write_panel(folder, f"panel-{number:03d}.png", batch, images[FUSED], dataset)
    if not rows:
        raise UserError(
            f"every chip of split {dataset.split!r} of {dataset.storage.uri} is quarantined: repair the dataset with"
            " `satfusion shard`, which builds damaged shards again"
        )
    result = Evaluation(name, dataset.split, dataset.simulation, registration, rows, methods, folder.uri)
    _write_csvs(folder, rows)
    folder.write("table.txt", result.table().encode())
    return result


def _folder_name(checkpoint: str, dataset: ChipDataset, registration: Mode) -> str:
    """Return the folder name of an evaluation: split, checkpoint and options that differ from the defaults."""
    name = f"{dataset.split}-{checkpoint}"
    if registration != "centred":
        name += f"-{registration}"
    return name if dataset.simulation == "off" else f"{name}-{dataset.simulation}"


def baselines(batch: Batch) -> dict[str, Tensor]:
    """Return two baselines: bicubic of the clearest revisit, and of the per-pixel median of the revisits.

    The median of an even number of revisits is the mean of the middle two. Each is [B, C, H, W].
    """
    size = batch.hr.shape[-2:]
    clearest = batch.lr[torch.arange(len(batch.chips)), batch.revisit]
    median = batch.lr.quantile(0.5, dim=1)

    def bicubic(image: Tensor) -> Tensor:
        return functional.interpolate(image, size=size, mode="bicubic", align_corners=False)

    return {"bicubic_clearest": bicubic(clearest), "bicubic_median": bicubic(median)}


def _write_panel(folder: Storage, name: str, batch: Batch, fused: Tensor, dataset: ChipDataset) -> None:
    buffer = io.BytesIO()
    picture = panel(batch, fused, dataset.chip_id(batch.chips[0]), dataset.index.facts.bands.hr_rgb)
    Image.fromarray(picture).save(buffer, format="PNG")
    folder.write(name, buffer.getvalue())


def _write_csvs(folder: Storage, rows: list[dict[str, object]]) -> None:
    by_aoi: list[dict[str, object]] = []
    for key in dict.fromkeys((row["aoi"], row["method"]) for row in rows):
        own = [row for row in rows if (row["aoi"], row["method"]) == key]
        means = {column: _mean([row[column] for row in own]) for column in COLUMNS}
        place = {"aoi": key[0], "method": key[1], "chips": len(own), "agreement": own[0]["agreement"]}
        by_aoi.append(place | means)
    folder.write("chips.csv", _csv(rows))
    folder.write("aois.csv", _csv(by_aoi))


def _csv(rows: list[dict[str, object]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _mean(values: list[object]) -> float:
    return float(np.mean(np.asarray(values, dtype=np.float64)))
