"""Aggregation over ranks and steps: the mean of losses, the sum of counts over ranks."""

from __future__ import annotations

import pytest
import torch

from pipeline.quality.losses import LossParts
from pipeline.reporting.tags import LOSS_TAGS, STEP_TAGS, VAL_TAGS, Averaged, Shown, over_ranks, shown


def row(loss: list[float], retries: list[float], rate: list[float]) -> dict[str, torch.Tensor]:
    return {
        "train/loss": torch.tensor(loss),
        "data/retries": torch.tensor(retries),
        "train/learning_rate": torch.tensor(rate),
    }


def test_counts_are_summed_over_ranks_and_the_rest_averaged() -> None:
    merged = over_ranks(row([0.25, 0.75], [9, 0], [0.5, 0.5]))
    assert merged == {"train/loss": 0.5, "data/retries": 9, "train/learning_rate": 0.5}


def test_steps_between_two_rows_are_averaged_and_counts_stand_where_they_are() -> None:
    since = Averaged()
    for step in (1, 2, 3):
        since.add(row([step, 2 * step], [step, 0], [0.1 * step] * 2))
    merged = since.take()
    assert merged["train/loss"].tolist() == [2, 4]
    assert merged["data/retries"].tolist() == [3, 0]
    assert torch.allclose(merged["train/learning_rate"], torch.tensor([0.3, 0.3]))
    since.add(row([7, 8], [4, 1], [0.4] * 2))
    assert since.take()["train/loss"].tolist() == [7, 8]


def test_rates_are_averaged_over_the_time_they_take() -> None:
    """Five steps of 8 chips in 10, 1, 1, 1 and 1 s; the second rank measured twice the time."""
    since = Averaged()
    for seconds in (10, 1, 1, 1, 1):
        since.add({"time/chips_per_second": 8 / torch.tensor([seconds, 2 * seconds], dtype=torch.float64)})
    row = since.take()
    torch.testing.assert_close(row["time/chips_per_second"], torch.tensor([40 / 14, 40 / 28], dtype=torch.float64))
    assert over_ranks(row)["time/chips_per_second"] == pytest.approx(40 / 21)


def test_every_logged_loss_is_a_field_of_the_loss() -> None:
    assert set(LOSS_TAGS) == set(LossParts._fields) - {"shift"}
    assert set(LOSS_TAGS.values()) <= set(STEP_TAGS)


def test_stored_names_have_one_place_each_on_the_page() -> None:
    stored = [*STEP_TAGS, *VAL_TAGS, *(tag.replace("val/", "val_ema/") for tag in VAL_TAGS)]
    places = [shown(tag + suffix) for tag in stored for suffix in ("", "_min", "_max", "_p95")]
    assert len(set(places)) == len(places)
    assert not [place.tag for place in places if "_" in place.tag.partition("/")[0]]
    groups = sorted({place.tag.partition("/")[0] for place in places})
    assert groups[:2] == ["loss", "quality"]
    assert [group for group in groups if not group.startswith("quality")] == ["loss", "speed", "store", "training"]
    assert shown("train/loss_p95") == Shown("loss/train", "p95")
    assert shown("val/psnr_adjusted_min") == Shown("quality-adjusted/psnr", "min")
    assert shown("time/samples_per_second") == Shown("speed/chips_per_second", "all")
    assert shown("else") == Shown("else", "all")
