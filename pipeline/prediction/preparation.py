"""Dataset that weights were trained on, and the defaults where it is gone."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal

from models.config import ModelConfig
from pipeline.config import DataConfig
from pipeline.data import ChipDataset
from pipeline.training.checkpoint import Checkpoint
from sharding.errors import UserError
from sharding.format.layout import WORLDSTRAT_CHIPS
from sharding.prepare.options import NUM_BANDS, RGB_BANDS, SampleOptions
from sharding.storage import StorageUnavailableError

logger = logging.getLogger(__name__)


def training_dataset(checkpoint: Checkpoint) -> ChipDataset | None:
    """Return the training split that a checkpoint was trained on.

    If the dataset is gone or another one has its place, None is returned, with a warning.

    Raises:
        StorageUnavailableError: Its store does not answer: the defaults would give other images than the same command
            later.
    """
    uri = checkpoint.config.data.uri
    try:
        dataset = ChipDataset(uri, "train", DataConfig(uri=uri))
        if dataset.index.digest == checkpoint.position.index_digest:
            return dataset
        reason = "is another dataset now"
    except StorageUnavailableError:
        raise
    except UserError as error:
        reason = f"cannot be read ({error})"
    logger.warning("%s, on which the weights were trained, %s", uri, reason)
    return None


def folder_preparation(dataset: ChipDataset | None, model: ModelConfig) -> SampleOptions:
    """Return the preparation of a folder's AOIs: that of the training's dataset, else the default, with a warning.

    The number of revisits is the weights': a training that simulates its revisits may take more than its dataset holds.

    Raises:
        UserError: The dataset is not known, and no default has the weights' bands.
    """
    if dataset is not None:
        return replace(dataset.index.preparation, revisits=model.revisits)
    options = default_preparation(model)
    if options is None:
        raise UserError(
            f"--input is a folder of WorldStrat, which has no {model.bands} bands as the weights take: name a dataset "
            f"of {model.bands} bands"
        )
    logger.warning("AOIs are prepared with the defaults, LR %s px and HR %s px", options.lr_size, options.hr_size)
    return options


def scene_preparation(dataset: ChipDataset | None, model: ModelConfig) -> SampleOptions:
    """Return the preparation of a user's scenes: that of the training's scenes, with the weights' revisits."""
    known = dataset is not None and dataset.index.facts.source == "scenes"
    usual = dataset.index.preparation if dataset is not None and known else SampleOptions()
    return replace(usual, revisits=model.revisits, lr_size=None, hr_size=None)


def default_preparation(model: ModelConfig) -> SampleOptions | None:
    """Return WorldStrat's default preparation with a model's bands and revisits; None if it has no such bands."""
    if model.bands == len(RGB_BANDS):
        return SampleOptions(revisits=model.revisits)
    levels: tuple[Literal["l2a", "l1c"], ...] = ("l2a", "l1c")
    for level in levels:
        if NUM_BANDS[level] == model.bands:
            return SampleOptions(level=level, bands="all", revisits=model.revisits)
    return None


def window_size(dataset: ChipDataset | None, model: ModelConfig) -> int:
    """Return the side of the training's chips, LR pixels; WorldStrat's if the dataset is not known.

    Raises:
        UserError: The dataset is not known, and the model does not fit WorldStrat.
    """
    if dataset is not None:
        return dataset.grid.size
    if default_preparation(model) is None:
        raise UserError(
            f"the side of the chips that weights of {model.bands} bands were trained on is not known without their "
            "dataset: give it as window="
        )
    return WORLDSTRAT_CHIPS.size
