"""Options of sources: the kind of source, and how its scenes become samples."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Literal

from sharding.arguments import check_values
from sharding.errors import UserError
from sharding.format.layout import CHIP
from sharding.prepare.options import SampleOptions

KINDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("level", "bands", "hr", "lr_size", "hr_size"), ("worldstrat",)),
    **dict.fromkeys(("scale", "offset", "offset_since", "mask_nodata"), ("worldstrat",)),
    **dict.fromkeys(("tile", "overlap", "chip", "split_by", "block_km"), ("scenes",)),
    **dict.fromkeys(("few_revisits", "select", "max_cloud"), ("worldstrat", "scenes")),
    "bits": ("pancollection",),
}
"""Kinds of sources that use an option; all kinds use the others."""
_TITLES = {"worldstrat": "WorldStrat"}
_DAY = re.compile(r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])")


def is_day(text: str) -> bool:
    """Return whether a text is a day, YYYY-MM-DD."""
    return _DAY.fullmatch(text) is not None


@dataclass(frozen=True)
class SourceOptions:
    """Options of a source. A kind refuses the options that it would ignore, see `KINDS`.

    Raises:
        UserError: For an invalid value; it names the option, the value and the valid ones.
    """

    source: Literal["worldstrat", "scenes", "pancollection"] = "worldstrat"
    """Kind of source: ``worldstrat``, ``scenes`` (GeoTIFFs beside a scenes.toml) or ``pancollection`` (HDF5 files)."""

    few_revisits: Literal["drop", "repeat"] = "drop"
    """AOIs with fewer revisits than --revisits: ``drop`` skips them, ``repeat`` uses their revisits several times."""

    scale: float = 1.0
    """Reflectance of a value of 1 in WorldStrat's revisits; other sources have it in scenes.toml or by --bits."""

    offset: float = 0.0
    """Reflectance of a value of 0 there, such as -0.1."""

    offset_since: str | None = field(default=None, metadata={"metavar": "DATE"})
    """First day whose revisits have --offset, such as 2022-01-25; earlier ones have none. None: all have it."""

    min_agreement: float | None = field(default=None, metadata={"metavar": "R"})
    """Skip samples whose revisits have a lower correlation with the target than this, -1 to 1. None skips none."""

    max_nodata: float | None = field(default=None, metadata={"metavar": "PERCENT"})
    """Skip samples whose target or PAN have more pixels without data than this, in percent. None skips none."""

    mask_nodata: bool = False
    """Leave WorldStrat's pixels without data out of resizing, loss and metrics; ``scenes`` always does."""

    tile: int | None = field(default=None, metadata={"metavar": "PX"})
    """Side of a tile of larger scenes, PAN pixels. None makes tiles of about 150 LR pixels."""

    overlap: int = field(default=0, metadata={"metavar": "PX"})
    """PAN pixels that neighbouring tiles share."""

    chip: int = field(default=CHIP, metadata={"metavar": "PX"})
    """Side and stride of chips, LR pixels; a smaller sample is one chip."""

    bits: int | None = field(default=None, metadata={"metavar": "N"})
    """Bits of a value of ``pancollection``, whose largest becomes 1. None takes those of a file's sensor."""

    split_by: Literal["scene", "block"] = "scene"
    """Unit of the split: ``scene`` (with overlapping ones), or ``block`` of --block-km, which divides scenes."""

    block_km: float = field(default=1.0, metadata={"metavar": "KM"})
    """Side of a block of --split-by block, km."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.tile is not None and not 1 <= self.tile <= 20_000:
            raise UserError(f"--tile {self.tile} is out of range: it must be from 1 to 20000 px")
        if self.bits is not None and not 1 <= self.bits <= 32:
            raise UserError(f"--bits {self.bits} is out of range: it must be from 1 to 32")
        if not 1 <= self.chip <= 4096:
            raise UserError(f"--chip {self.chip} is out of range: it must be from 1 to 4096 px")
        if not 0 < self.scale <= 1e6:
            raise UserError(f"--scale {self.scale:g} is out of range: it must be above 0 and at most 1000000")
        if not -1e6 <= self.offset <= 1e6:
            raise UserError(f"--offset {self.offset:g} is out of range: it must be from -1000000 to 1000000")
        if self.offset_since is not None and not (self.offset and is_day(self.offset_since)):
            raise UserError(f"--offset-since {self.offset_since!r} needs a day YYYY-MM-DD, and --offset")
        if self.min_agreement is not None and not -1 <= self.min_agreement <= 1:
            raise UserError(f"--min-agreement {self.min_agreement:g} is out of range: it must be from -1 to 1")
        if self.max_nodata is not None and not 0 <= self.max_nodata <= 100:
            raise UserError(f"--max-nodata {self.max_nodata:g} is out of range: it must be from 0 to 100 percent")
        if not 0 <= self.overlap <= 10_000:
            raise UserError(f"--overlap {self.overlap} is out of range: it must be from 0 to 10000 px")
        if self.overlap and self.split_by == "block":
            raise UserError(f"--overlap {self.overlap} would show one split the land of another: drop it or --split-by")
        if not 0 < self.block_km <= 10_000:
            raise UserError(f"--block-km {self.block_km:g} is out of range: it must be above 0 and at most 10000 km")
        for name in self.given:
            self._refuse_ignored(name)
        if "block_km" in self.given and self.split_by != "block":
            raise UserError(f"--block-km {self.block_km:g} needs --split-by block: give it, or drop --block-km")

    @property
    def given(self) -> dict[str, str | bool | int | float]:
        """Options that differ from the usual ones, without the kind of source."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "source"}
        usual = {item.name: item.default for item in fields(self) if item.default is not MISSING}
        return {name: value for name, value in values.items() if value != usual[name]}

    def without_sizes(self, sample: SampleOptions) -> SampleOptions:
        """Return the options of samples whose images keep their own pixels.

        Raises:
            UserError: For an option that this kind would ignore.
        """
        usual = SampleOptions()
        for item in fields(sample):
            if getattr(sample, item.name) not in (getattr(usual, item.name), None):
                self._refuse_ignored(item.name)
        sample = replace(sample, lr_size=None, hr_size=None)
        if self.source != "pancollection":
            return sample
        if sample.revisits not in (1, usual.revisits):
            raise UserError(
                f"--revisits {sample.revisits}: patches of pancollection have one image: drop it, and train with "
                f"data.simulate=sensor data.simulated_revisits={sample.revisits}"
            )
        return replace(sample, revisits=1)

    def _refuse_ignored(self, name: str) -> None:
        """Refuse an option that this kind would ignore."""
        kinds = KINDS.get(name, (self.source,))
        if self.source not in kinds:
            option = "--" + name.replace("_", "-")
            owners = " and ".join(_TITLES.get(kind, kind) for kind in kinds)
            raise UserError(f"{option} is an option of {owners}, and --source is {self.source}: drop it")
