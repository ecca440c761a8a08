"""Evaluation of a checkpoint on a split, beside baselines without training: the verb ``evaluate``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from pipeline.config import DataConfig
from pipeline.data import ChipDataset
from pipeline.evaluation.perturb import Kind
from pipeline.evaluation.result import AVERAGED, FUSED, Evaluation, Row, earlier_results
from pipeline.evaluation.scoring import Elsewhere, Found, draw, score_part, scores_of
from pipeline.networks import load_network, load_published_network
from pipeline.quality.constants import CPU
from pipeline.quality.registration import Mode
from pipeline.training.checkpoint import read_checkpoint, select_checkpoint
from pipeline.world import World, current_world
from sharding.errors import UserError
from sharding.storage import Storage, open_storage
from sharding.storage.lock import Lock

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of an evaluation."""

    registration: Mode = "centred"
    """Mode of registering predictions to the target: ``centred`` or ``published``."""
    panels: int = 9
    """Number of chips drawn as PNG, the first ones of the split."""
    perturb: tuple[Kind, ...] = ()
    """Kinds of perturbations of the revisits that are scored too."""
    classes: Mapping[str, str] = field(default_factory=dict)
    """Land-cover class by AOI; empty if unknown."""


@dataclass(frozen=True)
class Job:
    """Networks, and the split that they are measured on."""

    networks: Mapping[str, nn.Module]
    """Networks by method."""
    dataset: ChipDataset
    """The split."""
    name: str
    """Name of the checkpoint."""
    folder: Storage
    """Folder of the results."""
    trained: bool
    """Whether the weights are known to be trained on this dataset."""

    def place_on(self, device: torch.device) -> None:
        """Move the networks to a device, ready to predict."""
        for network in self.networks.values():
            network.to(device).eval()

    def picture(self, row: Row) -> bytes:
        """Return the panel of a row's chip as PNG."""
        own = range(self.dataset.num_chips)
        place = row["aoi"], row["chip"]
        each = self.dataset.chips_per_scene
        chip = next(chip for chip in own if (self.dataset.aoi(chip), chip % each) == place)
        return draw(self.networks[FUSED], self.dataset, chip)


def evaluate_run(
    uri: str,
    split: str,
    which: str,
    *,
    data_uri: str = "",
    output: str = "",
    options: EvaluateOptions | None = None,
) -> Evaluation:
    """Evaluate a checkpoint of a run and write the metrics into a folder for its split and checkpoint.

    Args as of `run_job`.
    """
    options = options or EvaluateOptions()
    return measure(run_job(uri, split, which, data_uri=data_uri, output=output, options=options), options)


def run_job(uri: str, split: str, which: str, *, data_uri: str, output: str, options: EvaluateOptions) -> Job:
    """Load a checkpoint of a run and open the split.

    Args:
        uri: Run folder.
        split: Split of the dataset.
        which: ``best`` (least validation loss), ``last`` or a step.
        data_uri: Dataset; empty for the run's own.
        output: Folder or s3:// prefix above the results; empty for ``evaluation/`` in the run folder.
        options: Options of the evaluation.

    Raises:
        UserError: No such run, checkpoint or dataset.
    """
    run = open_storage(uri)
    checkpoint = read_checkpoint(run, select_checkpoint(run, which))
    networks = {FUSED: load_network(checkpoint)}
    if checkpoint.state.ema:
        networks[AVERAGED] = load_network(checkpoint, checkpoint.state.ema)
    # The nodes' disk cache is not on this machine, and every sample is read only once.
    data = replace(checkpoint.config.data, cache_dir="")
    dataset = ChipDataset(data_uri or data.uri, split, data)
    dataset.check_fits(checkpoint.config.model)
    name = _folder_name(checkpoint.name, dataset, options.registration)
    digest = dataset.index.digest
    trained = digest == checkpoint.position.index_digest
    if not trained:
        logger.warning(
            "%s is not the dataset that %s was trained on: its %s AOIs may be among the trained ones",
            dataset.storage.uri,
            checkpoint.name,
            dataset.split,
        )
        name += f"-{digest[:8]}"
    folder = open_storage(output).child(name) if output else run.child(f"evaluation/{name}")
    return Job(networks, dataset, checkpoint.name, folder, trained)


def published_job(
    path: Path,
    pair: str,
    data_uri: str,
    split: str,
    output: str,
    *,
    simulate: str = "off",
    options: EvaluateOptions,
) -> Job:
    """Load a checkpoint of the published code and open the split.

    Bands and revisits are the dataset's; width and zoom are the published ones.

    Args:
        path: The file, see `models.published.read_published`.
        pair: ``ENCODER+HEAD``.
        data_uri: Dataset.
        split: Split of the dataset.
        output: Folder or s3:// prefix above the results.
        simulate: Mode of simulating revisits from the target, as the later published trainings and tests do; ``off``
            uses the dataset's.
        options: Options of the evaluation.

    Raises:
        UserError: The file is unreadable or of another model; no such model or dataset.
    """
    dataset = ChipDataset(data_uri, split, DataConfig(simulate=simulate))
    bands = len(dataset.index.facts.bands.lr)
    network = load_published_network(path, pair, bands=bands, revisits=dataset.revisits)
    dataset.check_fits(network.config)
    name = f"{network.config.encoder}+{network.config.head}-{path.stem}"
    folder = f"{_folder_name(name, dataset, options.registration)}-{dataset.index.digest[:8]}"
    return Job({FUSED: network}, dataset, name, open_storage(output).child(folder), trained=False)


def measure(job: Job, options: EvaluateOptions, elsewhere: Elsewhere | None = None) -> Evaluation:
    """Run the split through the networks, by method; replace the rows and panels in the job's folder.

    All ranks of a process group call it together, share the chips, and return the same result; rank 0 writes.

    Args:
        job: Networks and split.
        options: Options of the evaluation.
        elsewhere: Function from the number of AOIs to the scores of each, computed by `part`; None computes them here.

    Raises:
        UserError: The folder cannot be written to, another evaluation writes to it, or it has files of these names that
            no evaluation wrote; nothing was computed. Or all chips are quarantined.
    """
    world = current_world()
    with ExitStack() as stack:
        earlier, refusal = list[str](), None
        if world.is_main:
            try:
                stack.enter_context(Lock(job.folder, "evaluate"))
                earlier = earlier_results(job.folder)
            except UserError as error:
                refusal = error
        world.raise_together(refusal)
        return _measure(job, options, world, elsewhere, earlier)


def part(job: Job, options: EvaluateOptions, number: int, parts: int, device: torch.device = CPU) -> Found:
    """Score one of ``parts`` equal stretches of a job's split: with as many parts as AOIs, the chips of one AOI."""
    job.place_on(device)
    return score_part(
        job.networks,
        job.dataset,
        job.name,
        options.registration,
        options.perturb,
        options.classes,
        part=number,
        parts=parts,
        device=device,
    )


def _measure(
    job: Job, options: EvaluateOptions, world: World, elsewhere: Elsewhere | None, earlier: Sequence[str]
) -> Evaluation:
    dataset, folder = job.dataset, job.folder
    job.place_on(world.device)
    if elsewhere is None:
        found = world.gather_objects(part(job, options, world.rank, world.size, world.device))
    else:
        found = list(elsewhere(dataset.num_aois))
    scores = scores_of(found, job.networks)
    if not scores.chips:
        raise UserError(
            f"every chip of split {dataset.split!r} of {dataset.storage.uri} is quarantined: repair the dataset with"
            " `satfusion shard`, which builds damaged shards again"
        )
    result = Evaluation(
        job.name,
        dataset.split,
        dataset.simulation,
        options.registration,
        scores.rows,
        scores.methods,
        folder.uri,
        dataset=dataset.storage.uri,
        digest=dataset.index.digest,
        trained=job.trained,
        skipped=dataset.num_chips - len(scores.chips),
        perturbed=scores.perturbed,
    )
    if world.is_main:
        drawn = (chip for chip in scores.chips if chip < options.panels)
        panels = ((f"panel-{chip:03d}.png", draw(job.networks[FUSED], dataset, chip)) for chip in drawn)
        result.write(folder, panels, earlier)
    return result


def _folder_name(checkpoint: str, dataset: ChipDataset, registration: Mode) -> str:
    """Return the folder name of an evaluation: split, checkpoint and options that differ from the defaults."""
    name = f"{dataset.split}-{checkpoint}"
    if registration != "centred":
        name += f"-{registration}"
    return name if dataset.simulation == "off" else f"{name}-{dataset.simulation}"
