"""Scores of every chip of a split, computed in parts: by the ranks of a process group, or by tasks of a cluster."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.data import ChipDataset, evaluation_batches
from pipeline.data.batches import Batch
from pipeline.evaluation.baselines import BASELINES, PANSHARPENED, baselines, median
from pipeline.evaluation.classes import UNKNOWN
from pipeline.evaluation.perturb import Kind, levels, perturb, unperturbed
from pipeline.evaluation.result import COLUMNS, COMPARED, FUSED, Row
from pipeline.quality.influence import revisit_shares
from pipeline.quality.metrics import image_metrics
from pipeline.quality.no_reference import no_reference
from pipeline.quality.opensr import opensr_measures
from pipeline.quality.registration import Mode
from pipeline.reporting.panels import panel
from pipeline.training.validation import resolution_ratio
from sharding.progress import progress

logger = logging.getLogger(__name__)

PERTURBED = (FUSED, BASELINES[1])
"""Methods that are scored on perturbed inputs."""


Found = dict[int, tuple[list[Row], list[Row]]]
"""Rows of each chip of a part: those of the methods, and those of perturbed inputs."""
Elsewhere = Callable[[int], Iterable[Found]]
"""Function from a number of parts to the scores of each."""


@dataclass(frozen=True)
class Scores:
    """Rows of a split, in the order of its chips; the same on every rank."""

    chips: tuple[int, ...]
    """Numbers of the scored chips, ascending."""
    methods: tuple[str, ...]
    """Scored methods."""
    rows: list[Row]
    """A row per chip and method."""
    perturbed: list[Row]
    """A row per chip, kind, level and method."""


def score_part(
    networks: Mapping[str, nn.Module],
    dataset: ChipDataset,
    name: str,
    registration: Mode,
    kinds: Sequence[Kind],
    classes: Mapping[str, str],
    *,
    part: int,
    parts: int,
    device: torch.device,
) -> Found:
    """Score the chips of one of ``parts`` equal stretches of a split.

    Args:
        networks: Networks by method, on the device.
        dataset: The split.
        name: Name of the weights, for the progress bar.
        registration: Mode of registering predictions to the target.
        kinds: Kinds of perturbations.
        classes: Class by AOI; empty to leave out the column.
        part: Number of the stretch, from 0.
        parts: Number of stretches.
        device: Device of the networks.
    """
    found: Found = {}
    with progress(-(-dataset.num_chips // parts), f"evaluating {name}", "chip") as bar:
        for batch, counts in evaluation_batches(dataset, part, parts, device):
            bar.update()
            if not counts:
                if not batch.weight[0]:
                    logger.warning(
                        "skipped in the metrics: %s is quarantined or holds no data", dataset.chip_id(batch.chips[0])
                    )
                continue
            place = _place(dataset, batch.chips[0], classes)
            with torch.no_grad():
                rows = list(_rows(networks, batch, place, registration, resolution_ratio(dataset)))
                moved = [
                    row
                    for kind in kinds
                    for row in _perturbed(networks[FUSED], batch, place, registration, kind, dataset)
                ]
            found[batch.chips[0]] = rows, moved
    return found


def scores_of(parts: Iterable[Found], methods: Iterable[str]) -> Scores:
    """Return the scores of all parts, in the order of the chips; ``methods`` are those of the networks."""
    everyone = {chip: rows for part in parts for chip, rows in part.items()}
    chips = tuple(sorted(everyone))
    return Scores(
        chips,
        (*methods, *BASELINES, *PANSHARPENED),
        [row for chip in chips for row in everyone[chip][0]],
        [row for chip in chips for row in everyone[chip][1]],
    )


def draw(network: nn.Module, dataset: ChipDataset, chip: int) -> bytes:
    """Return the panel of a chip as PNG, computed on the network's device."""
    batch = dataset.evaluation_batch(chip, next(network.parameters()).device)
    with torch.no_grad():
        fused = _fuse(network, batch)
        shares = revisit_shares(batch.lr, fused, lambda lr: _fuse(network, replace(batch, lr=lr)))
        picture = panel(batch, fused, shares, dataset.chip_id(chip), dataset.index.facts.bands.hr_rgb)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def _place(dataset: ChipDataset, chip: int, classes: Mapping[str, str]) -> Row:
    aoi = dataset.aoi(chip)
    place: Row = {"aoi": aoi, "chip": chip % dataset.chips_per_scene, "agreement": dataset.agreement(chip)}
    if (own := dataset.place(chip)) != aoi:
        place["place"] = own
    return place | {"class": classes.get(own, UNKNOWN)} if classes else place


def _fuse(network: nn.Module, batch: Batch) -> Tensor:
    fused: Tensor = network(batch.lr, batch.pan, batch.revisit).fused.float()
    return fused


def _rows(
    networks: Mapping[str, nn.Module], batch: Batch, place: Row, registration: Mode, ratio: float
) -> Iterator[Row]:
    images = {method: _fuse(network, batch) for method, network in networks.items()} | baselines(batch)
    middle = median(batch)
    for method, image in images.items():
        values = image_metrics(image, batch.hr, registration, ratio, batch.valid)
        values |= no_reference(image, middle, batch.pan) | opensr_measures(image, middle, batch.hr, batch.valid)
        yield {**place, "method": method, **{column: _value(values[column]) for column in COLUMNS}}


def _value(measured: Tensor) -> float | None:
    """Return a measured number; None where there is none."""
    number = float(measured.item())
    return None if math.isnan(number) else number


def _perturbed(
    network: nn.Module, batch: Batch, place: Row, registration: Mode, kind: Kind, dataset: ChipDataset
) -> Iterator[Row]:
    """Yield the rows of one kind, from the inputs as they are on."""
    for level in (unperturbed(kind, dataset.revisits), *levels(kind, dataset.revisits)):
        moved = batch if level == unperturbed(kind, dataset.revisits) else perturb(batch, kind, level)
        images = {FUSED: _fuse(network, moved), BASELINES[1]: baselines(moved)[BASELINES[1]]}
        for method in PERTURBED:
            metrics = image_metrics(images[method], batch.hr, registration, resolution_ratio(dataset), batch.valid)
            values = {column: _value(metrics[column]) for column in COMPARED}
            yield {**place, "perturbation": kind, "level": level, "method": method, **values}
