"""Scenes to predict: AOIs of a WorldStrat folder, or samples of a dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from models.config import ModelConfig
from sharding.errors import UserError, nearest
from sharding.format.entries import SampleEntry, ShardEntry
from sharding.format.index import INDEX_NAME, SPLITS, Index
from sharding.format.sample import fetch_sample
from sharding.prepare.inputs import SceneInput, read_input, sample_input
from sharding.prepare.options import SampleOptions
from sharding.sources.worldstrat.files import open_source
from sharding.sources.worldstrat.layout import AoiFiles, check_files, find_aois
from sharding.storage import Storage, open_storage


@dataclass(frozen=True)
class NamedInput:
    """A scene that is read when it is needed."""

    aoi: str
    """Name of the AOI."""
    read: Callable[[], SceneInput]
    """Function that reads it; UnusableError if it cannot be fused."""


def find_inputs(
    uri: str, options: SampleOptions, model: ModelConfig, *, aois: Sequence[str] = (), split: str | None = None
) -> list[NamedInput]:
    """Return the scenes of a WorldStrat folder or of a dataset.

    Args:
        uri: Folder with ``hr_dataset`` and ``lr_dataset`` or their zips, or one of these zips; or a dataset, local or
            s3://.
        options: Preparation of the AOIs of a folder.
        model: Configuration of the weights.
        aois: Names of the AOIs; empty for all.
        split: Split of a dataset; None for all.

    Raises:
        UserError: No such input, AOI or split, or the weights need other bands or revisits.
    """
    storage = None if uri.endswith(".zip") else open_storage(uri)
    if storage is not None and ("://" in uri or storage.exists(INDEX_NAME)):
        found = _samples(storage, model, split)
    elif split is not None:
        raise UserError(f"--split {split} is for a dataset, and --input {uri} is none: drop it")
    else:
        found = _aois(Path(uri), options, model)
    if not aois:
        return list(found.values())
    for aoi in aois:
        if aoi not in found:
            raise UserError(f"--aoi {aoi!r} is not in {uri}{nearest(aoi, found)}")
    return [found[aoi] for aoi in dict.fromkeys(aois)]


def _samples(storage: Storage, model: ModelConfig, split: str | None) -> dict[str, NamedInput]:
    index = Index.load(storage)
    _check_fits(storage.uri, index.preparation, model)
    found: dict[str, NamedInput] = {}
    for name in [split] if split else SPLITS:
        for shard, entry in index.samples(name):
            found[entry.aoi] = NamedInput(entry.aoi, partial(_read_sample, index.preparation, storage, shard, entry))
    if not found:
        raise UserError(f"split {split!r} of {storage.uri} is empty: name another with --split")
    return found


def _read_sample(options: SampleOptions, storage: Storage, shard: ShardEntry, entry: SampleEntry) -> SceneInput:
    return sample_input(fetch_sample(storage, shard, entry), options)


def _aois(folder: Path, options: SampleOptions, model: ModelConfig) -> dict[str, NamedInput]:
    _check_fits(str(folder), options, model)
    source = open_source(folder.parent if folder.suffix == ".zip" else folder, options.level)
    return {aoi.name: NamedInput(aoi.name, partial(_read_aoi, aoi, options)) for aoi in find_aois(source)}


def _read_aoi(aoi: AoiFiles, options: SampleOptions) -> SceneInput:
    check_files(aoi, options, target=False)
    return read_input(aoi, options)


def _check_fits(uri: str, options: SampleOptions, model: ModelConfig) -> None:
    bands = len(options.band_numbers)
    if bands != model.bands:
        raise UserError(f"the weights take {model.bands} bands, and {uri} gives {bands}: use weights of {bands} bands")
    if options.revisits != model.revisits:
        raise UserError(
            f"the weights take {model.revisits} revisits, and {uri} holds {options.revisits} a sample: use weights of "
            f"{options.revisits} revisits, or shard again with --revisits {model.revisits}"
        )
