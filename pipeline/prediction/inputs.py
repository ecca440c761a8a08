"""Scenes to predict: AOIs of a WorldStrat folder, or samples of a dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from models.config import ModelConfig
from sharding.errors import UserError, nearest
from sharding.format.entries import SampleEntry, ShardEntry
from sharding.format.index import INDEX_NAME, SPLITS, Index
from sharding.format.layout import Facts, worldstrat_facts
from sharding.format.sample import fetch_sample
from sharding.prepare.inputs import SceneInput, read_input, read_whole_scene, sample_input
from sharding.prepare.options import SampleOptions
from sharding.sources.scenes.description import FILE_NAME
from sharding.sources.scenes.whole import find_whole_scenes
from sharding.sources.worldstrat.files import open_source
from sharding.sources.worldstrat.layout import AoiFiles, check_files, find_aois
from sharding.storage import Storage, open_storage


@dataclass(frozen=True)
class NamedInput:
    """A scene that is read when it is needed."""

    aoi: str
    """Name of the AOI."""
    read: Callable[[], SceneInput]
    """Function that reads it; UnusableError if it cannot be fused, CorruptedError if a dataset's sample is damaged."""


@dataclass(frozen=True)
class FoundInputs:
    """Scenes of one folder or dataset."""

    uri: str
    """The folder or dataset."""
    facts: Facts
    """Facts of the dataset, or of one that the folder would give."""
    revisits: int
    """Revisits of a scene."""
    scenes: Sequence[NamedInput]
    """The scenes."""

    def check_fits(self, model: ModelConfig, simulated: bool = False) -> None:
        """Refuse weights that need other bands or revisits; ``simulated`` if their training simulated the revisits.

        Raises:
            UserError: The weights do not fit; the message names both numbers.
        """
        bands, uri = len(self.facts.bands.lr), self.uri
        if bands != model.bands:
            raise UserError(
                f"the weights take {model.bands} bands, and {uri} gives {bands}: use weights of {bands} bands"
            )
        if self.revisits != model.revisits:
            reason = ", which their training simulated from the target and predict does not," if simulated else ""
            raise UserError(
                f"the weights take {model.revisits} revisits{reason} and {uri} holds {self.revisits} a sample: use "
                f"weights of {self.revisits} revisits, or an --input of {model.revisits}"
            )


def find_inputs(
    uri: str,
    prepare: Callable[[], SampleOptions],
    scenes: Callable[[], SampleOptions],
    *,
    aois: Sequence[str] = (),
    split: str | None = None,
) -> FoundInputs:
    """Return the scenes of a WorldStrat folder, of a description of a user's GeoTIFFs, or of a dataset.

    Args:
        uri: Folder with ``hr_dataset`` and ``lr_dataset`` or their zips, or one of these zips; a ``scenes.toml``
            or its folder; or a dataset, local or s3://.
        prepare: Function that returns the preparation of a WorldStrat folder's AOIs; a dataset has its own.
        scenes: Function that returns the preparation of a user's scenes.
        aois: Names of the AOIs; empty for all.
        split: Split of a dataset; None for all.

    Raises:
        UserError: No such input, AOI or split.
    """
    storage = None if uri.endswith((".zip", ".toml")) else open_storage(uri)
    if storage is not None and ("://" in uri or storage.exists(INDEX_NAME)):
        inputs = _samples(storage, split)
    elif split is not None:
        raise UserError(f"--split {split} is for a dataset, and --input {uri} is none: drop it")
    elif uri.endswith(".toml"):
        inputs = _whole_scenes(Path(uri), scenes())
    elif (Path(uri) / FILE_NAME).exists():
        inputs = _whole_scenes(Path(uri) / FILE_NAME, scenes())
    else:
        inputs = _aois(Path(uri), prepare())
    if not aois:
        return inputs
    found = {scene.aoi: scene for scene in inputs.scenes}
    for aoi in aois:
        if aoi not in found:
            raise UserError(f"--aoi {aoi!r} is not in {uri}{nearest(aoi, found)}")
    return replace(inputs, scenes=[found[aoi] for aoi in dict.fromkeys(aois)])


def _samples(storage: Storage, split: str | None) -> FoundInputs:
    index = Index.load(storage)
    bands = index.facts.bands.lr
    found = {
        entry.aoi: NamedInput(entry.aoi, partial(_read_sample, bands, storage, shard, entry))
        for name in ([split] if split else SPLITS)
        for shard, entry in index.samples(name)
    }
    if not found:
        raise UserError(f"split {split!r} of {storage.uri} is empty: name another with --split")
    return FoundInputs(storage.uri, index.facts, index.preparation.revisits, list(found.values()))


def _read_sample(bands: tuple[str, ...], storage: Storage, shard: ShardEntry, entry: SampleEntry) -> SceneInput:
    return sample_input(fetch_sample(storage, shard, entry), bands)


def _aois(folder: Path, options: SampleOptions) -> FoundInputs:
    source = open_source(folder.parent if folder.suffix == ".zip" else folder, options.level)
    scenes = [NamedInput(aoi.name, partial(_read_aoi, aoi, options)) for aoi in find_aois(source)]
    return FoundInputs(str(folder), worldstrat_facts(options), options.revisits, scenes)


def _whole_scenes(path: Path, options: SampleOptions) -> FoundInputs:
    found = find_whole_scenes(path.parent, path.name)
    facts = found.facts(options)
    scenes = [
        NamedInput(scene.name, partial(read_whole_scene, scene, options, facts.bands.lr)) for scene in found.scenes
    ]
    return FoundInputs(str(path), facts, options.revisits, scenes)


def _read_aoi(aoi: AoiFiles, options: SampleOptions) -> SceneInput:
    check_files(aoi, options, target=False)
    return read_input(aoi, options)
