"""Options of sample preparation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from sharding.arguments import check_values
from sharding.errors import UserError
from sharding.schema import convert

STEP = 3e-5
"""Reflectance per step of the stored uint16; the largest value is 65535 x 3e-5 = 1.966."""
RGB_BANDS = (4, 3, 2)
"""Red, green, blue as 1-based positions in Sentinel-2 rasters."""
NUM_BANDS = {"l2a": 12, "l1c": 13}
"""Number of bands in each product's rasters: all of Sentinel-2; L2A has no cirrus band (B10)."""
_L2A_NAMES = (
    *("coastal", "blue", "green", "red", "rededge071", "rededge075"),
    *("rededge078", "nir", "nir08", "nir09", "swir16", "swir22"),
)
BAND_NAMES = {"l2a": _L2A_NAMES, "l1c": (*_L2A_NAMES[:10], "cirrus", *_L2A_NAMES[10:])}
"""Names of the bands in each product's rasters, as the EO extension of STAC gives them."""
MOST_PX = 10_000
"""Largest side of a resized image."""
LR_SIZE, HR_SIZE = 160, 500
"""Sides of the grids of the published training, px."""


@dataclass(frozen=True)
class SampleOptions:
    """Options of a sample. The same files and options give the same bytes; a dataset's index stores the options.

    Raises:
        UserError: For an invalid value; it names the option, the value and the valid ones.
    """

    level: Literal["l2a", "l1c"] = "l2a"
    """Product of Sentinel-2: ``l2a`` (surface reflectance, 12 bands) or ``l1c`` (top of atmosphere, 13 bands)."""

    bands: Literal["true_color", "all"] = "true_color"
    """Bands of Sentinel-2: ``true_color`` (4, 3, 2) or ``all``, in the product's order."""

    revisits: Annotated[int, Meta(ge=1, le=1000)] = field(default=8, metadata={"metavar": "R"})
    """Revisits of a sample; AOIs with fewer are skipped."""

    select: Literal["first", "clearest", "nearest"] = "first"
    """Choice of revisits: the ``first`` in order, or of all the ``clearest``, or the ``nearest`` in date."""

    hr: Literal["ps", "rgbn"] = "ps"
    """SPOT raster of the targets: ``ps`` (1.5 m, pansharpened) or ``rgbn`` (6 m)."""

    lr_size: Annotated[int, Meta(ge=1, le=MOST_PX)] | None = field(default=LR_SIZE, metadata={"metavar": "PX"})
    """Side of the LR grid, px. None keeps each AOI's own."""

    hr_size: Annotated[int, Meta(ge=1, le=MOST_PX)] | None = field(default=HR_SIZE, metadata={"metavar": "PX"})
    """Side of the HR and PAN grid, px. None keeps each AOI's own."""

    dtype: Literal["uint16", "float32"] = "uint16"
    """Type of stored images: ``uint16`` in steps of 3e-5, or ``float32`` reflectance."""

    max_cloud: Annotated[float, Meta(ge=0, le=100)] | None = field(default=None, metadata={"metavar": "PERCENT"})
    """Skip AOIs whose chosen revisits have a higher mean cloud cover than this, in percent. None skips none."""

    def __post_init__(self) -> None:
        check_values(self)
        if (self.lr_size is None) != (self.hr_size is None):
            raise UserError("--native keeps both grids: give it without --lr-size and --hr-size")

    @property
    def band_numbers(self) -> tuple[int, ...]:
        """Sentinel-2 bands of a sample, as 1-based positions in the product's rasters."""
        return RGB_BANDS if self.bands == "true_color" else tuple(range(1, NUM_BANDS[self.level] + 1))

    @property
    def data_layer(self) -> str:
        """Layer name of the product's rasters: ``L2A_data`` or ``L1C_data``."""
        return f"{self.level.upper()}_data"

    @property
    def step(self) -> float:
        """Reflectance of a stored value of 1."""
        return STEP if self.dtype == "uint16" else 1.0

    @property
    def rgb(self) -> tuple[int, int, int]:
        """0-based positions of red, green and blue among the bands."""
        red, green, blue = (self.band_numbers.index(band) for band in RGB_BANDS)
        return red, green, blue

    @property
    def sample_bytes(self) -> int:
        """Approximate size of a sample in a shard; native grids are assumed to have WorldStrat's usual sizes."""
        lr, hr = self.lr_size or 158, self.hr_size or 1054
        values = self.revisits * len(self.band_numbers) * lr**2 + (3 + 1) * hr**2
        return values * np.dtype(self.dtype).itemsize + self.revisits * lr**2

    def to_json(self) -> dict[str, object]:
        """Return the table for an index. It holds band numbers and the step, so that any reader can use it."""
        table = {**asdict(self), "bands": list(self.band_numbers), "step": self.step}
        table["hr_source"] = table.pop("hr")
        return table

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> SampleOptions:
        """Parse a table of ``to_json``; ValueError for another table."""
        named = {name: value for name, value in table.items() if name not in ("hr_source", "step")}
        named["bands"] = "true_color" if table.get("bands") == list(RGB_BANDS) else "all"
        try:
            options = convert({**named, "hr": table.get("hr_source")}, cls)
        except (UserError, ValueError) as error:
            raise ValueError(f"preparation: {error}") from None
        if options.to_json() != table:
            raise ValueError("preparation: its bands or its step are not those of its options, or it has other keys")
        return options
