"""Layout of WorldStrat: the files of each AOI, and those that a sample needs.

Facts of the dataset that this module relies on: AOI names contain spaces and hyphens; a revisit's number is the last
``-<n>-`` of a file's name and the order is numeric; AOIs have 8 to 16 revisits; SCL is optional, and the L1C product
has no cloud masks.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sharding.errors import Reason, UnusableError, UserError
from sharding.files import read_text
from sharding.format.layout import VALID
from sharding.prepare.options import SampleOptions
from sharding.run.splits import natural_key
from sharding.sources.source import Scene
from sharding.sources.worldstrat.files import Source, SourceFile
from sharding.sources.worldstrat.rasters import read_scene

SPLIT_FILE = "stratified_train_val_test_split.csv"

_REVISIT_FILE = re.compile(r"([0-9]+)(?:-(L2A_data|L1C_data|CLM|SCL|dataMask)\.tiff?|\.(metadata))")
_SPOT_FILE = re.compile(r"_(ps|rgbn|pan)\.tiff?")


@dataclass(frozen=True)
class AoiFiles:
    """Existing files of an AOI; none has been read."""

    name: str
    """Name of the AOI."""

    hr: Mapping[str, SourceFile]
    """SPOT rasters by name: ``ps``, ``rgbn``, ``pan``."""

    revisits: Mapping[int, Mapping[str, SourceFile]]
    """Files by revisit number, in order, and layer: ``L2A_data``, ``CLM``, ``SCL``, ``dataMask``, ``metadata``."""

    flaw: tuple[Reason, str] | None = None
    """Reason why none of them may be read."""

    scale: float = 1.0
    """Reflectance of a value of 1 in the revisits."""

    offset: float = 0.0
    """Reflectance of a value of 0 in them."""

    offset_since: str | None = None
    """First day whose revisits have ``offset``, YYYY-MM-DD; None if all have it."""

    few_revisits: str = "drop"
    """``drop`` or ``repeat``, see `sharding.sources.options.SourceOptions`."""

    mask_nodata: bool = False
    """True to leave pixels without data out of resizing, and to store where target and PAN hold data."""

    def candidates(self, options: SampleOptions) -> dict[int, Mapping[str, SourceFile]]:
        """Return the revisits from which a sample with these options is chosen."""
        numbers = list(self.revisits)
        if options.select == "first":
            numbers = numbers[: options.revisits]
        return {number: self.revisits[number] for number in numbers}

    def without(self, number: int) -> AoiFiles:
        """Return the AOI without one of its revisits."""
        return replace(self, revisits={key: files for key, files in self.revisits.items() if key != number})

    def spare(self, options: SampleOptions) -> tuple[SourceFile, ...]:
        """Return the files of revisits that a sample with these options does not read."""
        used = {file.name for file in self.used(options)}
        every = (file for revisit in self.revisits.values() for file in revisit.values())
        return tuple(file for file in every if file.name not in used)

    @property
    def group(self) -> str:
        """Name of the group that goes into one split: the AOI itself."""
        return self.name

    @property
    def footprint(self) -> None:
        """None: only the Sentinel-2 rasters, which are not read before, tell where an AOI is."""
        return None

    @property
    def recipe(self) -> str:
        """Text of what decides the pixels beside files and options: usually nothing."""
        usual = (self.few_revisits, self.scale, self.offset) == ("drop", 1.0, 0.0)
        text = "" if usual else f"{self.few_revisits} {self.scale!r} {self.offset!r}"
        if self.offset_since is not None:
            text += f" {self.offset_since}"
        return f"{text} {VALID}" if self.mask_nodata else text

    def check(self, options: SampleOptions) -> None:
        """Check the files, see `check_files`."""
        check_files(self, options)

    def read(self, options: SampleOptions) -> Scene:
        """Read the rasters, see `read_scene`."""
        return read_scene(self, options)

    def used(self, options: SampleOptions) -> tuple[SourceFile, ...]:
        """Return the files that a sample with these options reads, sorted by name: the same for folders and zips."""
        layers = (options.data_layer, "CLM", "SCL", "dataMask", "metadata")
        files = [self.hr[suffix] for suffix in (options.hr, "pan") if suffix in self.hr]
        for revisit in self.candidates(options).values():
            files += [revisit[layer] for layer in layers if layer in revisit]
        return tuple(sorted(files, key=lambda file: file.name))


def find_aois(source: Source) -> list[AoiFiles]:
    """Return the AOIs of a source in natural order, complete or not."""
    names = sorted({*source.hr, *source.lr}, key=natural_key)
    return [_sort_files(source, name) for name in names]


def read_split_file(source: Source) -> list[tuple[str, str]] | None:
    """Read the rows (AOI, split) of the published split file; None without such a file.

    A spreadsheet may have saved it: a byte-order mark, ``;`` or tabs between fields, quotes and spaces are accepted.

    Raises:
        UserError: If it is not a CSV in UTF-8 with the columns ``tile`` and ``split``.
    """
    path = source.folder / SPLIT_FILE
    if not path.exists():
        return None
    text = read_text("the split file (which --splits seeded does not read)", path)
    try:
        separator = max(",;\t", key=text.partition("\n")[0].count)
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        header, *rows = [*lines] or [[]]
        columns = [name.strip() for name in header]
        if not {"tile", "split"} <= set(columns):
            raise UserError(f"{path} lacks the column tile or split: use the published file, or --splits seeded")
        tile, split = columns.index("tile"), columns.index("split")
        filled = (row + [""] * (len(columns) - len(row)) for row in rows if any(map(str.strip, row)))
        return [(row[tile].strip(), row[split].strip()) for row in filled]
    except csv.Error as error:
        raise UserError(
            f"{path} cannot be read as CSV in UTF-8 ({error}): use the published file, or --splits seeded"
        ) from error


def check_files(aoi: AoiFiles, options: SampleOptions, *, target: bool = True) -> None:
    """Check that the files of a sample exist and may be read, without reading them.

    Args:
        aoi: The files.
        options: Options of the sample.
        target: False if no target is needed.

    Raises:
        UnusableError: For a flaw of the AOI, too few revisits, a missing file, or a file of absurd size.
    """
    if aoi.flaw is not None:
        raise UnusableError(*aoi.flaw)
    for suffix in (options.hr, "pan") if target else ("pan",):
        if suffix not in aoi.hr:
            advice = (
                "; `--hr rgbn` takes all targets from the 6 m rasters" if suffix == "ps" and "rgbn" in aoi.hr else ""
            )
            raise UnusableError("missing-file", f"{aoi.name}_{suffix}.tiff is missing{advice}")
    if len(aoi.revisits) < (1 if aoi.few_revisits == "repeat" else options.revisits):
        raise UnusableError("too-few-revisits", f"{len(aoi.revisits)} revisits where {options.revisits} are needed")
    # The L1C product has no cloud masks; other sources may have none at all, or scene classes only.
    masked = options.level == "l2a" and any("CLM" in revisit for revisit in aoi.revisits.values())
    needed = (options.data_layer, "CLM") if masked else (options.data_layer,)
    for number, revisit in aoi.candidates(options).items():
        for layer in needed:
            if layer not in revisit:
                raise UnusableError("missing-file", f"{aoi.name}-{number}-{layer}.tiff is missing")
    for file in aoi.used(options):
        file.check()


def _file_name(file: SourceFile) -> str:
    return file.name


def _sort_files(source: Source, name: str) -> AoiFiles:
    """Sort an AOI's files by kind. The AOI's name is removed first: its hyphens and numbers do not name a revisit."""
    hr: dict[str, SourceFile] = {}
    for file in sorted(
        source.hr.get(name, ()), key=_file_name
    ):  # where both exist, .tiff comes after .tif and is taken
        if match := _SPOT_FILE.fullmatch(file.name.removeprefix(name)):
            hr[sys.intern(match[1])] = file
    revisits: dict[int, dict[str, SourceFile]] = {}
    for file in sorted(source.lr.get(name, ()), key=_file_name):
        if match := _REVISIT_FILE.fullmatch(file.name.removeprefix(f"{name}-")):
            # All files of a layer share one string: a source has 200,000 files.
            revisits.setdefault(int(match[1]), {})[sys.intern(match[2] or match[3])] = file
    return AoiFiles(name, hr, dict(sorted(revisits.items())), source.flaws.get(name))
