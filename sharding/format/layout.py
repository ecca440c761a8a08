"""Layout of a dataset's samples: the arrays of each sample, and the facts that readers use instead of knowing a sensor.

Format 3 stores both in the index. A dataset of format 2 is WorldStrat's, so its preparation gives them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from sharding.prepare.options import BAND_NAMES, SampleOptions

IMAGES = ("lr", "clm", "hr", "pan")
"""Arrays of a sample: revisits, cloud masks, target, panchromatic image."""

VALID = "valid"
"""Further array of the samples of datasets whose facts list this mask: uint8 [1, H, W], 1 where target and PAN hold
data, 0 elsewhere. Pixels outside it count in no loss and no metric."""

Mask = Literal["clm", "valid"]

Dtype = Literal["|u1", "<u2", "<f4"]
"""Type of an array's values, as numpy names it."""

DTYPES: dict[Dtype, int] = {"|u1": 1, "<u2": 2, "<f4": 4}
"""Bytes of a value, by numpy's name of its type."""

MOST_SAMPLE_BYTES = 2**30
"""Largest sample: readers hold several of them in memory."""

_HR_BANDS = ("red", "green", "blue")

Side = Annotated[int, Meta(ge=1, le=2**20)]
Dimension = Annotated[int, Meta(ge=1, le=2**31)]
Name = Annotated[str, Meta(min_length=1, max_length=100)]


@dataclass(frozen=True)
class ArrayLayout:
    """Layout of one array."""

    shape: tuple[Dimension | None, ...]
    """Its shape; None for a dimension that differs between samples of this layout."""

    dtype: Dtype
    """Type of its values."""

    @property
    def bytes(self) -> int | None:
        """Size of its values in bytes; None if the shape is not known."""
        known = [size for size in self.shape if size is not None]
        return math.prod(known) * DTYPES[self.dtype] if len(known) == len(self.shape) else None

    def fits(self, shape: tuple[int, ...], dtype: str) -> bool:
        """Return True if an array has this layout."""
        sizes = zip(shape, self.shape, strict=False)
        same = len(shape) == len(self.shape) and all(wanted in (None, size) for size, wanted in sizes)
        return same and dtype == self.dtype

    def __str__(self) -> str:
        return f"{self.dtype.lstrip('<|')} [{', '.join('any' if size is None else str(size) for size in self.shape)}]"


SampleLayout = Mapping[str, ArrayLayout]
"""Layout of each array of a sample, by its name: ``lr``, ``clm`` ..."""


def rgb_positions(names: Sequence[str | None]) -> tuple[int, int, int]:
    """Return the 0-based positions of red, green and blue; without these names, of the first three bands."""
    try:
        red, green, blue = (list(names).index(band) for band in ("red", "green", "blue"))
    except ValueError:
        last = len(names) - 1
        red, green, blue = (min(position, last) for position in range(3))
    return red, green, blue


@dataclass(frozen=True)
class Bands:
    """Names of bands, in the order in which they are stored."""

    lr: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=1000)]
    """Bands of the revisits."""

    hr: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=1000)]
    """Bands of the target."""

    @property
    def lr_rgb(self) -> tuple[int, int, int]:
        """Positions of red, green and blue in the revisits."""
        return rgb_positions(self.lr)

    @property
    def hr_rgb(self) -> tuple[int, int, int]:
        """Positions of red, green and blue in the target."""
        return rgb_positions(self.hr)


@dataclass(frozen=True)
class ChipGrid:
    """Chips of a sample on the LR grid; chip ``i`` is at column ``i // rows`` and row ``i % rows``."""

    size: Side
    """Side of a chip, LR pixels."""

    stride: Side
    """Distance of neighbouring chips, LR pixels."""

    columns: Side
    """Chips of a sample along x."""

    rows: Side
    """Chips of a sample along y."""

    @property
    def count(self) -> int:
        """Chips of a sample."""
        return self.columns * self.rows

    @property
    def extent(self) -> tuple[int, int]:
        """Height and width of the smallest LR grid that holds all chips."""
        return (self.rows - 1) * self.stride + self.size, (self.columns - 1) * self.stride + self.size


WORLDSTRAT_CHIPS = ChipGrid(size=50, stride=50, columns=3, rows=3)
"""WorldStrat's chips, as published: nine a sample."""


@dataclass(frozen=True)
class Radiometry:
    """Reflectance of a stored value: ``scale`` times the value, plus ``offset``."""

    scale: Annotated[float, Meta(gt=0, le=1e9)]
    """Reflectance of a step."""

    offset: Annotated[float, Meta(ge=-1e9, le=1e9)] = 0.0
    """Reflectance of a stored 0."""


@dataclass(frozen=True)
class Facts:
    """Facts of a dataset that its readers use."""

    source: Name
    """Kind of source: ``worldstrat``."""

    bands: Bands
    """Names of the bands."""

    ratio: tuple[Dimension, Dimension] | None
    """HR and LR pixels along the same side, whose quotient is the ratio of the grids; None if samples differ."""

    chips: ChipGrid
    """Chips of a sample."""

    radiometry: Radiometry
    """Reflectance of stored values."""

    masks: tuple[Mask, ...]
    """Arrays that are masks: ``clm`` is 0 clear, 1 cloud, 255 no data; for ``valid`` see `VALID`."""

    options: Mapping[Name, str | bool | int | float] = field(default_factory=dict)
    """Options of the source that differ from the usual ones, by name."""


CHIP = 50
"""Side and stride of the chips of other sources than WorldStrat, LR pixels, where the samples are as large."""


def fitted_facts(
    source: str,
    bands: Bands,
    ratio: tuple[int, int] | None,
    options: SampleOptions,
    layouts: Iterable[SampleLayout],
    chip: int = CHIP,
    masks: tuple[Mask, ...] = ("clm",),
) -> Facts:
    """Return the facts of a dataset whose chips fit its samples: a sample smaller than a chip is one chip.

    Args:
        source: Kind of source.
        bands: Names of the bands.
        ratio: HR and LR pixels along the same side.
        options: Options of the samples.
        layouts: Layouts of all samples; all have the chips of the smallest.
        chip: Side of a chip, LR pixels.
        masks: Arrays that are masks.
    """
    return Facts(
        source=source,
        bands=bands,
        ratio=ratio,
        chips=fitted_chips(smallest(layouts) or (chip, chip), chip),
        radiometry=Radiometry(options.step),
        masks=masks,
    )


def fitted_chips(sides: tuple[int, int], chip: int) -> ChipGrid:
    """Return as many chips side by side as fit into the smallest sample, one if it is smaller than a chip."""
    height, width = sides
    size = min(chip, height, width)
    return ChipGrid(size, size, 1 + (width - size) // size, 1 + (height - size) // size)


def describe_chips(facts: Facts, chip: int, samples: Iterable[tuple[str, SampleLayout]]) -> list[str]:
    """Return a line for the user if the smallest sample gives all others smaller or fewer chips than they could have.

    Args:
        facts: Facts of the dataset; only samples of ``scenes`` are cut to sizes that the user chooses.
        chip: Wanted side of a chip, LR pixels.
        samples: Name and layout of each sample.
    """
    sides = [(layout["lr"].shape[-2], layout["lr"].shape[-1], name) for name, layout in samples]
    known = [(height, width, name) for height, width, name in sides if height and width]
    fitted = [(fitted_chips((height, width), chip), height, width, name) for height, width, name in known]
    if not fitted or facts.source != "scenes":
        return []
    chips = facts.chips
    area = {name: grid.count * grid.size**2 for grid, _, _, name in fitted}
    large, small = max(fitted, key=lambda item: area[item[-1]]), min(fitted, key=lambda item: area[item[-1]])
    if area[large[-1]] <= chips.count * chips.size**2:
        return []
    _, height, width, name = small
    return [
        f"the smallest sample sets the chips of all: {name!r} has {width} x {height} LR px, so each sample has "
        f"{chips.columns} x {chips.rows} chips of {chips.size} px, where the largest could have {large[0].columns} x "
        f"{large[0].rows} of {large[0].size} px: leave it out by --aois, or cut all alike by a smaller --tile"
    ]


def smallest(layouts: Iterable[SampleLayout]) -> tuple[int, int] | None:
    """Return the least height and width of the LR grids; None if they are not known."""
    sides = {layout["lr"].shape[-2:] for layout in layouts}
    heights, widths = [rows for rows, _ in sides], [columns for _, columns in sides]
    if not sides or None in heights or None in widths:
        return None
    return min(rows for rows in heights if rows), min(columns for columns in widths if columns)


def worldstrat_facts(options: SampleOptions, layouts: Iterable[SampleLayout] = ()) -> Facts:
    """Return the facts of a dataset of WorldStrat samples.

    Chips are the published ones if they fit; native samples have as many as the smallest holds, WorldStrat's the same.
    """
    lr, hr = options.lr_size, options.hr_size
    sides = smallest(layouts) or ((lr, lr) if lr is not None else WORLDSTRAT_CHIPS.extent)
    published = lr is not None and min(sides) >= max(WORLDSTRAT_CHIPS.extent)
    return Facts(
        source="worldstrat",
        bands=Bands(tuple(BAND_NAMES[options.level][number - 1] for number in options.band_numbers), _HR_BANDS),
        ratio=(hr, lr) if lr is not None and hr is not None else None,
        chips=WORLDSTRAT_CHIPS if published else fitted_chips(sides, CHIP),
        radiometry=Radiometry(options.step),
        masks=("clm",),
    )


def worldstrat_layout(options: SampleOptions) -> SampleLayout:
    """Return the layout of WorldStrat samples, whose native sizes are not known."""
    lr, hr = options.lr_size, options.hr_size
    dtype: Dtype = "<u2" if options.dtype == "uint16" else "<f4"
    return {
        "lr": ArrayLayout((options.revisits, len(options.band_numbers), lr, lr), dtype),
        "clm": ArrayLayout((options.revisits, 1, lr, lr), "|u1"),
        "hr": ArrayLayout((len(_HR_BANDS), hr, hr), dtype),
        "pan": ArrayLayout((1, hr, hr), dtype),
    }


def refuse_layout(layout: SampleLayout, facts: Facts, revisits: int, dtype: str) -> None:
    """Compare a layout with the facts of its dataset.

    Raises:
        ValueError: If they contradict each other; the message names the array.
    """
    names = (*IMAGES, *(mask for mask in facts.masks if mask not in IMAGES))
    lr, clm, hr, pan = (layout.get(name) for name in IMAGES)
    if lr is None or clm is None or hr is None or pan is None or layout.keys() != set(names):
        raise ValueError(f"it has {', '.join(layout) or 'no arrays'} where {', '.join(names)} are needed")
    value: Dtype = "<u2" if dtype == "uint16" else "<f4"
    *_, height, width = lr.shape if len(lr.shape) == 4 else (None, None)
    *_, rows, columns = hr.shape if len(hr.shape) == 3 else (None, None)
    wanted = {
        "lr": ArrayLayout((revisits, len(facts.bands.lr), height, width), value),
        "clm": ArrayLayout((revisits, 1, height, width), "|u1"),
        "hr": ArrayLayout((len(facts.bands.hr), rows, columns), value),
        "pan": ArrayLayout((1, rows, columns), value),
        VALID: ArrayLayout((1, rows, columns), "|u1"),
    }
    for name, array in ((name, wanted[name]) for name in names):
        if layout[name] != array:
            raise ValueError(f"{name} is {layout[name]} where {array} is needed")
    for low, high in ((height, rows), (width, columns)):
        if facts.ratio and low is not None and high is not None and high * facts.ratio[1] != low * facts.ratio[0]:
            raise ValueError(f"hr has {high} px for {low} of lr, and the ratio is {facts.ratio[0]}/{facts.ratio[1]}")
