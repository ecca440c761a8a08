"""Whole scenes for prediction: not cut into tiles, and with or without a target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sharding.errors import UnusableError, UserError
from sharding.format.layout import CHIP, Bands, Facts, fitted_facts
from sharding.prepare.options import SampleOptions
from sharding.sources.scenes.description import FILE_NAME, read_description
from sharding.sources.scenes.grid import Box, tiles
from sharding.sources.scenes.layout import find_scenes
from sharding.sources.scenes.opened import OpenedScene, open_scene
from sharding.sources.scenes.place import footprint
from sharding.sources.scenes.source import TileFiles, band_names


@dataclass(frozen=True)
class WholeScenes:
    """Scenes that a description finds, each as one tile of all its land."""

    scenes: tuple[TileFiles, ...]
    """The scenes, read without target."""
    first: OpenedScene
    """The first usable one: bands and ratio are the same in all."""

    def facts(self, options: SampleOptions) -> Facts:
        """Return the facts of a dataset of such scenes."""
        bands = band_names(self.first.visits[0].layer.names)
        ratio = self.first.ratio.numerator, self.first.ratio.denominator
        return fitted_facts("scenes", Bands(bands, bands), ratio, options, (), CHIP)


def find_whole_scenes(folder: Path, name: str = FILE_NAME, few_revisits: str = "drop") -> WholeScenes:
    """Find the scenes of a folder by its description, and read their headers.

    Args:
        folder: The folder.
        name: Name of the description in it.
        few_revisits: ``drop`` or ``repeat``, see `sharding.sources.options.SourceOptions`.

    Raises:
        UserError: If the description is missing or wrong, or no scene is usable; the message has the first reason.
    """
    told = read_description(folder, name, target=False)
    # The name of the PAN stands in for that of a target, and is not used as such.
    without = {scene.name for scene in told.scenes if not scene.target}
    told = replace(told, scenes=tuple(replace(scene, target=scene.target or scene.pan) for scene in told.scenes))
    scenes: list[TileFiles] = []
    first: OpenedScene | None = None
    for found in find_scenes(folder, told):
        own = told
        if found.revisits and (found.target is None or found.name in without):
            # The first revisit in the target's place asks for no more land and no other bands than are there.
            found, own = replace(found, target=found.revisits[0].image), replace(told, target=told.revisits)
        try:
            scene = open_scene(found, own, first)
            scenes.append(_whole(scene, few_revisits))
        except UnusableError as error:
            flaw = error.reason, error.detail
            scenes.append(TileFiles(found.name, found.name, None, Box(0, 0, 0, 0), None, flaw, few_revisits, False))
            continue
        first = first or scene
    if first is None:
        why = f"the first, {scenes[0].name!r}, has {': '.join(scenes[0].flaw or ())}" if scenes else "it finds none"
        raise UserError(f"{folder / name} has no usable scene ({why}): correct it")
    return WholeScenes(tuple(scenes), first)


def _whole(scene: OpenedScene, few_revisits: str) -> TileFiles:
    area, unit = scene.place.area, scene.ratio.numerator
    side = (max(area.width, area.height) // unit + 2) * unit
    box = next(tiles(area, side, 0, scene.ratio, scene.place.anchor), None)
    if box is None:
        raise UnusableError("no-overlap", f"its images share {area.width} x {area.height} PAN pixels of {unit} or more")
    corners = footprint(scene.place.grid.part(box))
    return TileFiles(scene.name, scene.name, corners, box, scene, None, few_revisits, target=False)
