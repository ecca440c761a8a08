"""What a sample is made of, as the user chooses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sharding.errors import UserError
from sharding.schema import RGB_BANDS, STEP, Preparation

LEVELS = ("l2a", "l1c")
NUM_BANDS = {"l2a": 12, "l1c": 13}
"""Bands of each product's rasters: all of Sentinel-2's, but L2A has no cirrus (B10)."""
BANDS = ("true_color", "all")
SELECTIONS = ("first", "clearest")
HR_SOURCES = ("ps", "rgbn")
DTYPES = ("uint16", "float32")
LR_SIZE, HR_SIZE = 160, 500
"""Sides of the grids that the published pipeline trains on, px."""


@dataclass(frozen=True)
class SampleOptions:
    """How an AOI becomes a sample. The same files and options give the same bytes.

    Raises:
        UserError: Naming the option, its value and what it may be.
    """

    level: str = "l2a"
    """Sentinel-2 product: ``l2a`` (surface reflectance, 12 bands) or ``l1c`` (top of atmosphere, 13 bands)."""

    bands: str = "true_color"
    """Sentinel-2 bands: ``true_color`` (4, 3, 2) or ``all`` of the product in its order."""

    revisits: int = 8
    """Revisits a sample; AOIs with fewer are left out."""

    select: str = "first"
    """Which revisits: the ``first`` in numeric order, or the ``clearest`` of all."""

    hr: str = "ps"
    """SPOT raster of the targets: ``ps`` (1.5 m, pansharpened) or ``rgbn`` (6 m)."""

    lr_size: int | None = LR_SIZE
    """Side of the LR grid, px; None keeps each AOI's own."""

    hr_size: int | None = HR_SIZE
    """Side of the HR and PAN grid, px; None keeps each AOI's own."""

    dtype: str = "uint16"
    """Of stored images: ``uint16`` in steps of 3e-5, or ``float32`` reflectance."""

    max_cloud: float | None = None
    """Leave out AOIs whose chosen revisits are cloudier on average, percent; None leaves out none."""

    def __post_init__(self) -> None:
        _among("--level", self.level, LEVELS)
        _among("--bands", self.bands, BANDS)
        _among("--select", self.select, SELECTIONS)
        _among("--hr", self.hr, HR_SOURCES)
        _among("--dtype", self.dtype, DTYPES)
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
    def preparation(self) -> Preparation:
        """What a dataset of these options says of itself."""
        return Preparation(
            level=self.level,
            bands=self.band_numbers,
            revisits=self.revisits,
            select=self.select,
            hr_source=self.hr,
            lr_size=self.lr_size,
            hr_size=self.hr_size,
            dtype=self.dtype,
            max_cloud=self.max_cloud,
            step=self.step,
        )

    @classmethod
    def of(cls, preparation: Preparation) -> SampleOptions:
        """Return the options that a dataset was made with."""
        return cls(
            level=preparation.level,
            bands="true_color" if preparation.bands == RGB_BANDS else "all",
            revisits=preparation.revisits,
            select=preparation.select,
            hr=preparation.hr_source,
            lr_size=preparation.lr_size,
            hr_size=preparation.hr_size,
            dtype=preparation.dtype,
            max_cloud=preparation.max_cloud,
        )


def _among(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{option} {value!r} is unknown: it may be {', '.join(known)}")
