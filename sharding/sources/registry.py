"""Registry of the kinds of sources."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sharding.prepare.options import SampleOptions
from sharding.sources.options import SourceOptions
from sharding.sources.pancollection.source import PanCollectionSource
from sharding.sources.scenes.source import ScenesSource
from sharding.sources.source import Source
from sharding.sources.worldstrat.source import WorldStratSource

SOURCES: dict[str, Callable[[Path, SampleOptions, SourceOptions], Source]] = {
    "worldstrat": WorldStratSource,
    "scenes": ScenesSource,
    "pancollection": PanCollectionSource,
}
"""Class of each kind, built from a folder and the options."""


def open_source(folder: Path, sample: SampleOptions, options: SourceOptions) -> Source:
    """Open a folder as the kind of source that the options name.

    Raises:
        UserError: If it is not such a source.
    """
    return SOURCES[options.source](folder, sample, options)
