"""What a sample is made of, as the user chooses it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from sharding.arguments import check_choices
from sharding.errors import UserError

STEP = 3e-5
"""Reflectance of one step of the stored uint16, whose largest value is then 65535 x 3e-5 = 1.966."""
RGB_BANDS = (4, 3, 2)
"""Red, green, blue as positions from 1 in Sentinel-2 rasters."""
NUM_BANDS = {"l2a": 12, "l1c": 13}
"""Bands of each product's rasters: all of Sentinel-2's, but L2A has no cirrus (B10)."""
LR_SIZE, HR_SIZE = 160, 500
"""Sides of the grids that the published pipeline trains on, px."""


@dataclass(frozen=True)
class SampleOptions:
    """How an AOI becomes a sample. The same files and options give the same bytes, and a dataset's index holds them.

    Raises:
        UserError: Naming the option, its value and what it may be.
    """

    level: Literal["l2a", "l1c"] = "l2a"
    """Product of Sentinel-2: ``l2a`` (surface reflectance, 12 bands) or ``l1c`` (top of atmosphere, 13 bands)."""

    bands: Literal["true_color", "all"] = "true_color"
    """Bands of Sentinel-2: ``true_color`` (4, 3, 2) or ``all`` of the product in its order."""

    revisits: int = field(default=8, metadata={"metavar": "R"})
    """Revisits of a sample; AOIs with fewer are left out."""

    select: Literal["first", "clearest"] = "first"
    """Which revisits: the ``first`` in numeric order, or the ``clearest`` of all."""

    hr: Literal["ps", "rgbn"] = "ps"
    """SPOT raster of the targets: ``ps`` (1.5 m, pansharpened) or ``rgbn`` (6 m)."""

    lr_size: int | None = field(default=LR_SIZE, metadata={"metavar": "PX"})
    """Side of the LR grid, px. None keeps each AOI's own."""

    hr_size: int | None = field(default=HR_SIZE, metadata={"metavar": "PX"})
    """Side of the HR and PAN grid, px. None keeps each AOI's own."""

    dtype: Literal["uint16", "float32"] = "uint16"
    """Type of stored images: ``uint16`` in steps of 3e-5, or ``float32`` reflectance."""

    max_cloud: float | None = field(default=None, metadata={"metavar": "PERCENT"})
    """Leave out AOIs whose chosen revisits are cloudier on average than this, in percent. None leaves out none."""

    def __post_init__(self) -> None:
        check_choices(self)
        for option, number in (("--revisits", self.revisits), ("--lr-size", self.lr_size), ("--hr-size", self.hr_size)):
            if number is not None and number < 1:
                raise UserError(f"{option} {number} is too small: the least is 1")
        if (self.lr_size is None) != (self.hr_size is None):
            raise UserError("--native keeps both grids: give it without --lr-size and --hr-size")
        if self.max_cloud is not None and not 0 <= self.max_cloud <= 100:
            raise UserError(f"--max-cloud {self.max_cloud} is no percentage: it must be from 0 to 100")

    @property
    def band_numbers(self) -> tuple[int, ...]:
        """The Sentinel-2 bands of a sample, as positions from 1 in the product's rasters."""
        return RGB_BANDS if self.bands == "true_color" else tuple(range(1, NUM_BANDS[self.level] + 1))

    @property
    def data_layer(self) -> str:
        """What the product's rasters are called: ``L2A_data`` or ``L1C_data``."""
        return f"{self.level.upper()}_data"

    @property
    def step(self) -> float:
        """Reflectance of 1 as it is stored."""
        return STEP if self.dtype == "uint16" else 1.0

    @property
    def rgb(self) -> list[int]:
        """Where red, green and blue stand among the bands, from 0."""
        return [self.band_numbers.index(band) for band in RGB_BANDS]

    @property
    def sample_bytes(self) -> int:
        """What a sample takes in a shard, about: native sizes are taken as WorldStrat's usual ones."""
        lr, hr = self.lr_size or 158, self.hr_size or 1054
        values = self.revisits * len(self.band_numbers) * lr**2 + (3 + 1) * hr**2
        return values * np.dtype(self.dtype).itemsize + self.revisits * lr**2

    def to_json(self) -> dict[str, object]:
        """Return what an index says of its samples. Bands are numbers there and the step is told, for any reader."""
        table = {**asdict(self), "bands": list(self.band_numbers), "step": self.step}
        table["hr_source"] = table.pop("hr")
        return table

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> SampleOptions:
        """Read what ``to_json`` wrote; another table is a ValueError, KeyError, TypeError or AttributeError."""
        named = {name: value for name, value in table.items() if name not in ("hr_source", "step")}
        named["bands"] = "true_color" if tuple(table["bands"]) == RGB_BANDS else "all"
        try:
            options = cls(hr=table["hr_source"], **named)
        except UserError as error:
            raise ValueError(str(error)) from error
        if options.to_json() != table:
            raise ValueError("its bands or its step are not those of its options")
        return options
