"""Validation: the metrics of the current weights on a split, over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.satfusion import Fusion
from pipeline.config import RunConfig
from pipeline.data import ChipDataset, evaluation_batches
from pipeline.data.batches import Batch
from pipeline.engines.engine import Engine
from pipeline.quality.influence import revisit_shares
from pipeline.quality.losses import fusion_loss
from pipeline.quality.metrics import RESOLUTION_RATIO, image_metrics
from pipeline.reporting.panels import panel
from pipeline.reporting.tags import VAL_TAGS
from pipeline.world import World
from sharding.errors import UserError

Image = npt.NDArray[np.uint8]
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Validated:
    """Result of a validation, the same on every rank."""

    metrics: dict[str, float]
    """Means over all chips, by VAL_TAGS."""
    by_rank: Tensor
    """[ranks, VAL_TAGS] means over each rank's chips, NaN for a rank without chips."""
    panels: dict[int, Image]
    """Panels of the first chips, by chip."""

    def __str__(self) -> str:
        names = ("val/loss", "val/psnr", "val/psnr_adjusted", "val/ssim")
        return ", ".join(f"{name.removeprefix('val/')} {self.metrics[name]:.4g}" for name in names)


def validate(
    engine: Engine,
    dataset: ChipDataset,
    world: World,
    config: RunConfig,
    panels: int | None = None,
    progressed: Callable[[], None] = lambda: None,
) -> Validated:
    """Predict every chip of a split and compare it with its target; all ranks call it together.

    Args:
        engine: Engine with the weights.
        dataset: Split.
        world: This process's place.
        config: Configuration of the loss, and of the panels.
        panels: Number of chips drawn; None takes ``output.panels``.
        progressed: Called after each forward pass.

    Raises:
        UserError: The split is empty, or all of it is quarantined.
    """
    rows: dict[int, list[float]] = {}
    drawn: dict[int, Image] = {}
    most = config.output.panels if panels is None else panels

    def fuse(batch: Batch, lr: Tensor) -> Tensor:
        fused = engine.predict(replace(batch, lr=lr)).fused
        progressed()
        return fused

    for place, (batch, counts) in enumerate(evaluation_batches(dataset, world.rank, world.size, world.device)):
        images = engine.predict(batch)
        progressed()
        # On every rank equally often, whichever draws: ZeRO 3 gathers weights in each forward pass.
        shares = revisit_shares(batch.lr, images.fused, partial(fuse, batch)) if place < most else []
        if not counts:
            continue
        chip = batch.chips[0]
        rows[chip] = _values(images, batch, config, resolution_ratio(dataset))
        if chip < most:
            rgb = dataset.index.facts.bands.hr_rgb
            drawn[chip] = panel(batch, images.fused, shares, dataset.chip_id(chip), rgb)
    everyone = _merged(world.gather_objects(rows))
    if not everyone:
        raise UserError(
            f"split {dataset.split!r} of {dataset.storage.uri} is empty or quarantined whole, so nothing"
            " says which weights are best: run `satfusion shard` again, which builds damaged shards again"
        )
    # Summed in chip order, so that the result does not depend on the distribution over ranks.
    table = torch.tensor([everyone[chip] for chip in sorted(everyone)], dtype=torch.float64)
    own = torch.tensor(list(rows.values()), dtype=torch.float64).reshape(-1, len(VAL_TAGS))
    return Validated(
        metrics=dict(zip(VAL_TAGS, table.mean(0).tolist(), strict=True)),
        by_rank=world.gather(own.mean(0).tolist()),
        panels=_merged(world.gather_objects(drawn)),
    )


def resolution_ratio(dataset: ChipDataset) -> float:
    """Return the size of a high-resolution pixel in low-resolution ones, for ERGAS; WorldStrat's is the published."""
    return RESOLUTION_RATIO if dataset.index.facts.source == "worldstrat" else 1 / dataset.scale


def _values(images: Fusion, batch: Batch, config: RunConfig, ratio: float) -> list[float]:
    """Return the values of VAL_TAGS for a batch of one chip."""
    loss = fusion_loss(images, batch.hr, config.loss, batch.valid, batch.lr).total
    metrics = image_metrics(images.fused, batch.hr, config.loss.registration, ratio, batch.valid)
    return [loss.item(), *(metrics[tag.removeprefix("val/")].item() for tag in VAL_TAGS[1:])]


def _merged(parts: list[dict[int, _Value]]) -> dict[int, _Value]:
    return {chip: value for part in parts for chip, value in part.items()}
