"""Logged values of a step and of a validation: their names, and their aggregation over ranks and steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.quality.names import ADJUSTED, METRICS

if TYPE_CHECKING:  # slow to import, and the monitor needs the names alone
    from torch import Tensor


@dataclass(frozen=True)
class Tag:
    """Aggregation of one logged value."""

    over_ranks: Literal["mean", "sum", "rate"] = "mean"
    """Aggregation over the ranks' values of one step."""
    over_steps: Literal["mean", "last", "rate"] = "mean"
    """Aggregation over the steps since the previous row; ``rate`` is the harmonic mean, that over the whole time."""


COUNT = Tag("sum", "last")
RATE = Tag("rate", "rate")
LOSS_TAGS: Mapping[str, str] = {
    "total": "train/loss",
    "mse": "train/mse",
    "mae": "train/mae",
    "ssim": "train/ssim_loss",
    "sam": "train/sam_loss",
    "angle": "train/angle",
    "consistency": "train/consistency",
}
"""Tag of each logged field of `pipeline.quality.losses.LossParts`; optional terms are logged if they have a weight."""
STEP_TAGS: Mapping[str, Tag] = {
    **dict.fromkeys(LOSS_TAGS.values(), Tag()),
    "train/grad_norm": Tag(),
    "train/learning_rate": Tag(over_steps="last"),
    "time/chips_per_second": RATE,
    "time/data_wait_seconds": Tag(),
    "time/effective": Tag(over_steps="last"),
    "time/checkpoint_stall_seconds": Tag(),
    "data/retries": COUNT,
    "data/read_again": COUNT,
    "data/quarantined_chips": COUNT,
    "store/retries": COUNT,
    "store/checkpoint_seconds": COUNT,
}
"""Tags of every value of a step, in the order of the columns of metrics.csv."""
RENAMED: Mapping[str, str] = {"time/samples_per_second": "time/chips_per_second"}
"""Column names of older runs by their current names."""
AVERAGED = "val_ema"
"""Group of the validation with averaged weights, in place of ``val``."""
VAL_TAGS = ("val/loss", *(f"val/{name}{suffix}" for suffix in ("", ADJUSTED) for name in METRICS))


ALERTS = "alerts"
"""Tag of the texts of alerts."""
STATISTICS = ("all", "min", "max", "p95")
"""Statistics of a stored tag: the one value of all ranks under the tag itself, others with a suffix."""
_SHOWN: Mapping[str, str] = {
    "train/loss": "loss/train",
    "train": "training",
    "val/loss": "loss/val",
    f"{AVERAGED}/loss": f"loss/{AVERAGED}",
    "val": "quality",
    AVERAGED: "quality-ema",
    "time": "speed",
    "data/retries": "store/dataset_retries",
    "store/retries": "store/run_folder_retries",
    "data": "store",
}
"""Tags that the monitor shows, by stored tag or by its group: the groups sort as loss, quality, speed, store.

TensorBoard's page Scalars takes ``_`` in a group's name for ``/``: ``quality_adjusted`` would stand before ``quality``.
"""


@dataclass(frozen=True)
class Shown:
    """Place of a stored tag in the monitor."""

    tag: str
    """Tag under which it is shown."""
    statistic: str
    """One of STATISTICS."""


def shown(stored: str) -> Shown:
    """Return the place of a scalar of the aggregate events in the monitor; tags of older runs are recognised too."""
    statistic = STATISTICS[0]
    for suffix in STATISTICS[1:]:
        if stored.endswith(f"_{suffix}"):
            stored, statistic = stored.removesuffix(f"_{suffix}"), suffix
    stored = RENAMED.get(stored, stored)
    group, _, name = stored.partition("/")
    if stored in _SHOWN:
        return Shown(_SHOWN[stored], statistic)
    group = _SHOWN.get(group, group)
    if group.startswith("quality") and name.endswith(ADJUSTED):
        group, name = group + ADJUSTED.replace("_", "-"), name.removesuffix(ADJUSTED)
    return Shown(f"{group}/{name}" if name else group, statistic)


def shown_image(stored: str) -> str:
    """Return the tag under which the monitor shows an image panel: ``val/0`` is chip 0 of the validation."""
    group, _, chip = stored.partition("/")
    return f"validation/chip {chip}" if group == "val" else stored


def over_ranks(by_rank: Mapping[str, Tensor]) -> dict[str, float]:
    """Return one value for each tag of a row of STEP_TAGS, whose values are [ranks]."""

    def merged(how: str, values: Tensor) -> Tensor:
        if how == "rate":
            return values.reciprocal().mean().reciprocal()
        return values.sum() if how == "sum" else values.mean()

    return {tag: merged(STEP_TAGS[tag].over_ranks, values).item() for tag, values in by_rank.items()}


class Averaged:
    """The average of the step rows since the last logged row."""

    def __init__(self) -> None:
        """Create an average without rows."""
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, by_rank: Mapping[str, Tensor]) -> None:
        """Add a step's row of STEP_TAGS, whose values are [ranks]."""
        self._count += 1
        for tag, values in by_rank.items():
            how = STEP_TAGS[tag].over_steps
            # Rates add up by the time that one takes: their plain mean would forget most of a slow step.
            added = values.reciprocal() if how == "rate" else values
            if tag in self._sums and how != "last":
                added = self._sums[tag] + added
            self._sums[tag] = added

    def take(self) -> dict[str, Tensor]:
        """Return the average row and reset."""
        row = {tag: self._averaged(STEP_TAGS[tag].over_steps, values) for tag, values in self._sums.items()}
        self._sums, self._count = {}, 0
        return row

    def _averaged(self, how: str, values: Tensor) -> Tensor:
        if how == "rate":
            return self._count / values
        return values if how == "last" else values / self._count
