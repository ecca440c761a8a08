"""Scenes of a source or a dataset to GeoTIFFs: the verb ``predict``.

Each AOI gets ``<AOI>.json`` (its sidecar), ``<AOI>.png`` and, last, ``<AOI>.tif``. The sidecar holds the fingerprint of
weights, inputs and options and the SHA-256 of the GeoTIFF: an output with the same fingerprint and whole bytes is kept,
so the same command resumes after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from pipeline.jobs import PredictJob
from pipeline.networks import load_weights
from pipeline.prediction.fusion import Fusion
from pipeline.prediction.inputs import FoundInputs, NamedInput, find_inputs
from pipeline.prediction.preparation import folder_preparation, scene_preparation, training_dataset
from pipeline.training.checkpoint import read_checkpoint, select_checkpoint
from sharding.errors import UnusableError, UserError
from sharding.format.checks import key_of
from sharding.format.layout import Facts
from sharding.prepare.inputs import SceneInput
from sharding.prepare.options import SampleOptions
from sharding.progress import progress
from sharding.rasters.cog import PixelType, RasterFacts, preview_png, write_cog
from sharding.schema import Natural, Sha256, decode
from sharding.scratch import scratch_folder
from sharding.storage import CorruptedError, NotFoundError, Storage, open_storage

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
SUFFIXES = (".json", ".png", ".tif")


@dataclass(frozen=True)
class PredictOptions:
    """Options of the outputs. The same weights, inputs and options give the same bytes."""

    pixels: PixelType = "uint16"
    """Type of the pixels: ``uint16`` in steps of 1e-4 reflectance, or ``float32``."""
    overwrite: bool = False
    """Replace outputs of other weights, inputs or options."""


class Outcome(NamedTuple):
    """What became of an AOI."""

    aoi: str
    """Name of the AOI."""
    made: bool = False
    """Whether an output was written; else one existed, or the AOI is skipped."""
    skipped: UnusableError | None = None
    """Reason why it cannot be fused."""


Runner = Callable[["Predictor", Sequence[str]], Iterable[Outcome]]
"""Function from a prediction and the names of its AOIs to their outcomes, in any order."""


@dataclass(frozen=True)
class Prediction:
    """What a prediction did."""

    folder: str
    """Folder of the outputs."""
    outcomes: Sequence[Outcome]
    """Outcome of each AOI, in the order of the input."""

    @property
    def made(self) -> list[str]:
        """Return the AOIs with a new output."""
        return [outcome.aoi for outcome in self.outcomes if outcome.made]

    @property
    def kept(self) -> list[str]:
        """Return the AOIs whose output existed."""
        return [outcome.aoi for outcome in self.outcomes if not outcome.made and outcome.skipped is None]

    @property
    def skipped(self) -> list[tuple[str, UnusableError]]:
        """Return the AOIs that cannot be fused, with the reason."""
        return [(outcome.aoi, outcome.skipped) for outcome in self.outcomes if outcome.skipped is not None]

    def lines(self) -> list[str]:
        """Return the summary that the command prints."""
        lines = [f"{aoi}: skipped, {error}" for aoi, error in self.skipped]
        counts = f"{len(self.made)} made, {len(self.kept)} kept, {len(self.skipped)} skipped"
        return [*lines, f"{counts}: {self.folder}"]


@dataclass(frozen=True)
class Predictor:
    """A network, the scenes that it fuses, and where their GeoTIFFs, previews and sidecars go."""

    fusion: Fusion
    """The network."""
    scenes: Sequence[NamedInput]
    """The scenes."""
    output: Storage
    """Folder of the outputs."""
    options: PredictOptions = PredictOptions()
    """Options of the outputs."""
    strict: bool = False
    """Whether an unusable AOI is an error; else it is skipped."""

    def predict(self, runner: Runner | None = None) -> Prediction:
        """Fuse all scenes; ``runner`` fuses them in place of this process, each by `predict_one`.

        Raises:
            UserError: Like `predict_one`; or no scene is usable.
        """
        names = [scene.aoi for scene in self.scenes]
        found: dict[str, Outcome] = {}
        with progress(len(names), "predicting", "AOI") as bar:
            for outcome in runner(self, names) if runner else map(self.predict_one, names):
                found[outcome.aoi] = outcome
                bar.update()
        report = Prediction(self.output.uri, [found[name] for name in names])
        if len(report.skipped) == len(names):
            aoi, why = report.skipped[0]
            raise UserError(f"no AOI can be fused; the first is {aoi!r} ({why})")
        return report

    def predict_one(self, aoi: str) -> Outcome:
        """Fuse one scene, unless its output exists.

        Raises:
            UserError: An output exists that was made of something else, or by another program; the weights cannot take
                the scene; or it is unusable, if that is an error.
        """
        try:
            scene = self._inputs[aoi].read()
        except (UnusableError, CorruptedError) as error:
            if self.strict:
                raise UserError(f"AOI {aoi!r} cannot be fused ({error}): repair it, or name another") from None
            skipped = error if isinstance(error, UnusableError) else UnusableError("unreadable", str(error))
            return Outcome(aoi, skipped=skipped)
        alone = len(self.scenes) == 1
        return Outcome(aoi, _predict_scene(self.fusion, scene, self.output, self.options, show_rows=alone))

    @cached_property
    def _inputs(self) -> dict[str, NamedInput]:
        return {scene.aoi: scene for scene in self.scenes}


def open_job(job: PredictJob) -> Predictor:
    """Load the weights of a job and find its scenes.

    Raises:
        UserError: The weights or the input cannot be used, or do not fit each other.
    """
    options = PredictOptions(job.pixels, job.overwrite)
    fusion, inputs = _published(job) if job.published_checkpoint else _of_run(job)
    return Predictor(fusion, inputs.scenes, open_storage(job.output), options, strict=bool(job.aoi))


def _of_run(job: PredictJob) -> tuple[Fusion, FoundInputs]:
    """Load the weights of a run and find the scenes.

    Windows have the size of the training's chips; of the input's chips if the training's dataset is gone.
    """
    assert job.run_uri is not None
    run, weights = open_storage(job.run_uri), job.weights or "raw"
    found = read_checkpoint(run, select_checkpoint(run, job.checkpoint or "best"))
    network, dataset, model = load_weights(found, weights), training_dataset(found), found.config.model
    inputs = find_inputs(
        job.input,
        lambda: folder_preparation(dataset, model),
        lambda: scene_preparation(dataset, model),
        aois=job.aoi,
        split=job.split,
    )
    inputs.check_fits(model, simulated=found.config.data.simulate != "off")
    if dataset and dataset.index.facts.bands.lr != inputs.facts.bands.lr:
        names = (list(known.facts.bands.lr) for known in (inputs, dataset.index))
        logger.warning("%s has the bands %s, and the weights were trained on %s, in this order", job.input, *names)
    if dataset and _ratio(dataset.index.facts) != _ratio(inputs.facts):
        trained, given = (_ratio(known) for known in (dataset.index.facts, inputs.facts))
        logger.warning("%s has a ratio of %s, and the weights were trained at %s", job.input, given, trained)
    window = (dataset.index if dataset else inputs).facts.chips.size
    fusion = Fusion.of(network, found.name, window=window, weights=weights, bf16=job.precision == "bf16")
    return fusion, inputs


def _ratio(facts: Facts) -> str:
    return f"{Fraction(*facts.ratio)}" if facts.ratio else "several values"


def _published(job: PredictJob) -> tuple[Fusion, FoundInputs]:
    """Load a published file of weights and find the scenes.

    Bands, revisits and the size of windows are a dataset's; AOIs of a folder are prepared as in the published training.
    """
    assert job.published_checkpoint is not None
    assert job.model is not None
    unsized = SampleOptions(lr_size=None, hr_size=None)
    inputs = find_inputs(job.input, SampleOptions, lambda: unsized, aois=job.aoi, split=job.split)
    facts = inputs.facts
    fusion = Fusion.load_published(
        job.published_checkpoint,
        job.model,
        bands=len(facts.bands.lr),
        revisits=inputs.revisits,
        window=facts.chips.size,
        bf16=job.precision == "bf16",
    )
    return fusion, inputs


def _predict_scene(
    fusion: Fusion, scene: SceneInput, output: Storage, options: PredictOptions, *, show_rows: bool
) -> bool:
    """Write one scene's outputs, unless they exist; return whether they were written."""
    name, described = key_of(scene.aoi), _describe(fusion, scene, options)
    if not _must_write(output, name, described["fingerprint"], options.overwrite):
        return False
    with scratch_folder("predict") as folder:
        path = folder / "scene.tif"
        with write_cog(path, _facts(scene, described)) as raster:
            for rows, valid in _rows(fusion, scene, show_rows):
                raster.write(rows, valid)
        digest, size = _digest(path)
        sidecar = {"format_version": FORMAT_VERSION, **described}
        sidecar["file"] = {"name": f"{name}.tif", "bytes": size, "sha256": digest}
        # The sidecar first: it proves that the other two are ours. The GeoTIFF last: it is what others wait for.
        output.write(f"{name}.json", (json.dumps(sidecar, indent=1, sort_keys=True) + "\n").encode())
        output.write(f"{name}.png", preview_png(path, scene.rgb))
        output.upload(f"{name}.tif", path)
    return True


def _describe(fusion: Fusion, scene: SceneInput, options: PredictOptions) -> dict[str, Any]:
    """Return what determines an output, with the digest of this as its fingerprint, and where it comes from."""
    described: dict[str, Any] = {
        "weights": {"name": fusion.name, "sha256": fusion.digest, "model": asdict(fusion.network.config)},
        "input": {"aoi": scene.aoi, "sha256": scene.digest()},
        "options": {"pixels": options.pixels, "precision": "bf16" if fusion.bf16 else "fp32", "window": fusion.window},
    }
    described["fingerprint"] = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    described["weights"]["kind"] = fusion.weights  # their digest tells them apart in the fingerprint
    georeference = {"crs": scene.crs, "transform": list(scene.transform)}
    described["input"] |= {**georeference, "clearest": scene.clearest, **scene.provenance}
    return described


def _facts(scene: SceneInput, described: dict[str, Any]) -> RasterFacts:
    weights, (height, width) = described["weights"], scene.pan.shape[-2:]
    return RasterFacts(
        height=height,
        width=width,
        bands=scene.bands,
        crs=scene.crs,
        transform=scene.transform,
        pixels=described["options"]["pixels"],
        tags={
            "SATFUSION_AOI": scene.aoi,
            "SATFUSION_MODEL": f"{weights['model']['encoder']}+{weights['model']['head']}",
            "SATFUSION_WEIGHTS": f"{weights['name']} sha256:{weights['sha256']}",
            "SATFUSION_INPUTS": f"sha256:{described['input']['sha256']}",
            "SATFUSION_UNITS": "reflectance = value * scale",
        },
    )


def _rows(fusion: Fusion, scene: SceneInput, show: bool) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """Yield the fused rows from top to bottom, each with the mask of the pixels with data."""
    top = 0
    with progress(scene.pan.shape[-2], f"fusing {scene.aoi}", "row") if show else nullcontext() as bar:
        for rows in fusion.stream(scene.lr, scene.pan, revisit=scene.clearest, step=scene.step):
            if not np.isfinite(rows).all():
                raise UserError(
                    f"the weights {fusion.name} give NaN or infinite values for {scene.aoi!r}: the training diverged, "
                    "or bf16 is too coarse; use another checkpoint, or --precision fp32"
                )
            yield rows, scene.valid(top, top + rows.shape[1])
            top += rows.shape[1]
            if bar is not None:
                bar.update(rows.shape[1])


class _File(msgspec.Struct):
    """Schema of a GeoTIFF in its sidecar."""

    sha256: Sha256
    bytes: Natural


class _Sidecar(msgspec.Struct):
    """Schema of what is read again of a sidecar."""

    fingerprint: Sha256
    file: _File


def _must_write(output: Storage, name: str, fingerprint: str, overwrite: bool) -> bool:
    """Return whether an AOI's output must be written; refuse to replace what is not the same output, damaged or cut.

    Raises:
        UserError: The output exists with another fingerprint and ``overwrite`` is off, or was not written by `predict`.
    """
    tif = f"{name}.tif"
    try:
        sidecar = decode(output.read(f"{name}.json"), _Sidecar)
    except NotFoundError:
        existing = [name + suffix for suffix in SUFFIXES[1:] if output.exists(name + suffix)]
        if existing:
            raise UserError(
                f"{output.uri}/{existing[0]} was not written by predict: move it away, or name another --output"
            ) from None
        return True
    except ValueError:
        raise UserError(
            f"{output.uri}/{name}.json was not written by predict: move it away, or name another --output"
        ) from None
    if sidecar.fingerprint != fingerprint:
        if overwrite:
            return True
        raise UserError(
            f"{output.uri}/{tif} was made of other weights, inputs or options: give --overwrite to replace it, or "
            "another --output"
        )
    try:
        return _digest_of(output.stream(tif)) != (sidecar.file.sha256, sidecar.file.bytes)
    except (NotFoundError, CorruptedError):
        return True


def _digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return _digest_of(iter(lambda: file.read(1 << 20), b""))


def _digest_of(pieces: Iterator[bytes]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
    return digest.hexdigest(), size
