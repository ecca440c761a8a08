"""Datasets that store where target and PAN hold data, from their shards to the losses and metrics of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.registry import build_model
from pipeline.config import DataConfig, RunConfig
from pipeline.data import BatchPlan, ChipDataset, TrainLoader, evaluation_batches
from pipeline.quality.losses import fusion_loss
from pipeline.quality.metrics import image_metrics
from pipeline.training.loop import run_training
from pipeline.world import World
from sharding.format.entries import ShardEntry
from sharding.format.index import INDEX_NAME, SPLITS, Index
from sharding.format.sample import fetch_sample
from sharding.format.writer import NewSample, ShardWriter
from sharding.storage import open_storage
from tests.chips import training_chip
from tests.command import column

MakeConfig = Callable[..., RunConfig]
EMPTY = 120
"""First column of the target that holds no data, of 200: the last column of chips has nothing to compare."""


def masked(uri: str, folder: Path, value: int) -> str:
    """Write a dataset like that at ``uri`` without data from column `EMPTY` on, where the target is ``value``."""
    storage, index = open_storage(uri), Index.load(open_storage(uri))
    folder.mkdir()
    splits: dict[str, tuple[ShardEntry, ...]] = {}
    for split in SPLITS:
        with (folder / f"{split}-00000.tar").open("wb") as file:
            writer = ShardWriter(file)
            for shard, entry in index.samples(split):
                sample = fetch_sample(storage, shard, entry)
                valid = np.ones((1, *sample.hr.shape[1:]), np.uint8)
                valid[..., EMPTY:] = 0
                hr = np.where(valid == 1, sample.hr, np.uint16(value))
                images = {"lr": sample.lr, "clm": sample.clm, "hr": hr, "pan": sample.pan, "valid": valid}
                writer.add(NewSample(sample.aoi, images, sample.meta))
            splits[split] = (writer.finish(f"{split}-00000.tar"),)
    facts = replace(index.facts, masks=("clm", "valid"))
    made = replace(index, splits=splits, facts=facts)
    open_storage(folder).write(INDEX_NAME, made.data)
    return str(folder)


@pytest.fixture(scope="module")
def pair(shards: dict[int, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two datasets that differ only where there is no data."""
    folder = tmp_path_factory.mktemp("masked")
    return masked(shards[1], folder / "zero", 0), masked(shards[1], folder / "bright", 60_000)


@pytest.mark.parametrize("windows", [False, True])
def test_the_mask_is_cropped_and_turned_with_the_target(pair: tuple[str, str], windows: bool) -> None:
    data = ChipDataset(pair[1], "train", DataConfig(random_windows=windows, loader_threads=1))
    loader = TrainLoader(data, BatchPlan.create(5, 0, 1), 0, seed=1)
    weights = set()
    for batch in loader.batches(0):
        assert batch.valid is not None
        assert batch.valid.shape == batch.pan.shape
        assert torch.equal(batch.valid[:, 0] == 0, (batch.hr > 1.79).all(dim=1))
        shares = batch.valid.mean(dim=(1, 2, 3))
        assert (batch.weight[shares == 0] == 0).all()
        assert (batch.weight[shares == 1] == 1).all()
        weights |= set(batch.weight.tolist())
        assert [micro.valid is not None and len(micro.valid) for micro in batch.split(2)] == [2, 2, 1]
    assert weights == {0.0, 1.0}
    # They are no damage.
    assert loader.quarantined_chips == 0


def test_evaluation_leaves_out_chips_without_data(pair: tuple[str, str]) -> None:
    data = ChipDataset(pair[0], "val", DataConfig())
    assert [counts for _, counts in evaluation_batches(data)] == [True] * 6 + [False] * 3


def test_values_without_data_change_no_loss_and_no_metric(pair: tuple[str, str], make_config: MakeConfig) -> None:
    config = make_config(Path("unused"))
    network = build_model(config.model)
    found = []
    for uri in pair:
        data, rows = ChipDataset(uri, "train", DataConfig(random_windows=True)), []
        for chip in range(0, data.num_chips, 4):
            batch = training_chip(data, chip, seed=1, epoch=0)
            with torch.no_grad():
                images = network(batch.lr, batch.pan, batch.revisit)
            loss = fusion_loss(images, batch.hr, config.loss, batch.valid).total
            metrics = image_metrics(images.fused, batch.hr, valid=batch.valid)
            rows.append(torch.stack([loss, *metrics.values(), batch.weight]))
        found.append(torch.stack(rows))
    assert 0 < found[0][:, -1].mean() < 1
    assert torch.equal(found[0], found[1])


def test_a_run_counts_the_chips_with_data(
    pair: tuple[str, str], world: World, make_config: MakeConfig, tmp_path: Path
) -> None:
    run_training(make_config(tmp_path, f"data.uri={pair[0]}", "train.max_steps=3", "train.engine=torch"))
    assert all(0 < float(loss) < 1 for loss in column(tmp_path, "train/loss"))
    assert 0 < float(column(tmp_path, "val/psnr")[-1]) < 60


def test_datasets_without_a_mask_have_none(shards: dict[int, str]) -> None:
    assert ChipDataset(shards[1], "val", DataConfig()).evaluation_batch(0).valid is None


def test_clouds_choose_the_revisits_of_a_chip(shards: dict[int, str], tmp_path: Path) -> None:
    """The second of two revisits is cloud on the left half of the chips' first column."""
    storage, index = open_storage(shards[1]), Index.load(open_storage(shards[1]))
    with (tmp_path / "val-00000.tar").open("wb") as file:
        writer = ShardWriter(file)
        sample = fetch_sample(storage, *index.samples("val")[0])
        clm = np.zeros_like(sample.clm)
        clm[1, ..., :25] = 1
        images = {"lr": sample.lr, "clm": clm, "hr": sample.hr, "pan": sample.pan}
        writer.add(NewSample(sample.aoi, images, {**sample.meta, "clearest": 1}))
        shard = writer.finish("val-00000.tar")
    open_storage(tmp_path).write(INDEX_NAME, replace(index, splits={"train": (), "val": (shard,), "test": ()}).data)
    for windows in (False, True):
        found = {}
        for cloudy in ("keep", "drop", "weight"):
            config = DataConfig(cloudy=cloudy, random_windows=windows)
            found[cloudy] = ChipDataset(str(tmp_path), "val", config)
        kept, dropped = (found[rule].evaluation_batch(0) for rule in ("keep", "drop"))
        assert torch.equal(dropped.lr[0, 0], kept.lr[0, 0])
        assert torch.equal(dropped.lr[0, 1], kept.lr[0, 0])
        assert (kept.revisit.item(), dropped.revisit.item()) == (1, 0)
        # A third and two thirds of two places are one each.
        assert torch.equal(found["weight"].evaluation_batch(0).lr, kept.lr)
        clear = [data.evaluation_batch(5) for data in found.values()]
        assert all(torch.equal(batch.lr, clear[0].lr) and batch.revisit.item() == 1 for batch in clear)
