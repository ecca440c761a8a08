"""WorldStrat as a source of scenes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from sharding.errors import UserError
from sharding.format.layout import Facts, SampleLayout, worldstrat_facts
from sharding.prepare.options import SampleOptions
from sharding.sources.options import SourceOptions
from sharding.sources.worldstrat.files import open_source
from sharding.sources.worldstrat.layout import AoiFiles, find_aois, read_split_file


class WorldStratSource:
    """A folder of WorldStrat, or of its zips; implements `sharding.sources.source.Source`."""

    def __init__(self, folder: Path, sample: SampleOptions, options: SourceOptions) -> None:
        """List the files.

        Raises:
            UserError: If it is no folder of WorldStrat, or options whose target has other pixels than PAN.
        """
        if sample.hr == "rgbn" and sample.hr_size is None:
            raise UserError(
                "--native with --hr rgbn would keep targets of 6 m beside PAN of 1.5 m, which no model takes: "
                "drop one of them"
            )
        self._source = open_source(folder, sample.level)
        self._mask_nodata = options.mask_nodata
        self.scenes: Sequence[AoiFiles] = [
            replace(
                aoi,
                few_revisits=options.few_revisits,
                scale=options.scale,
                offset=options.offset,
                offset_since=options.offset_since,
                mask_nodata=options.mask_nodata,
            )
            for aoi in find_aois(self._source)
        ]
        """AOIs in natural order, complete or not."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user."""
        return tuple(f"{path!r} points outside its folder, and was not read" for path in self._source.strays)

    def facts(self, options: SampleOptions, layouts: Iterable[SampleLayout]) -> Facts:
        """Return the facts of a dataset; its chips are the published ones if they fit."""
        facts = worldstrat_facts(options, layouts)
        return replace(facts, masks=(*facts.masks, "valid")) if self._mask_nodata else facts

    def sample_bytes(self, options: SampleOptions) -> int:
        """Return the approximate size of a sample."""
        return options.sample_bytes

    def split_rows(self) -> list[tuple[str, str]] | None:
        """Return the rows of the published split file, None without it."""
        return read_split_file(self._source)
