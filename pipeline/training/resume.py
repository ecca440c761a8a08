"""Start of a run in a used run folder: the newest checkpoint, or an error for another run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping

import msgspec
import torch

from pipeline.config import RunConfig, Section
from pipeline.data.dataset import ChipDataset
from pipeline.deepspeed_keys import DeepSpeedKeys
from pipeline.order import OrderState, random_words
from pipeline.reporting.run_folder import CONFIG_FILE, RunFolder
from pipeline.reporting.time_account import TIME_FILE
from pipeline.training.checkpoint import (
    Checkpoint,
    DamagedCheckpointError,
    complete_checkpoints,
    newest_checkpoint,
    read_origin,
)
from pipeline.world import World
from sharding.errors import UserError
from sharding.schema import Sha256, decode
from sharding.storage import Storage
from sharding.storage.lock import Lock

logger = logging.getLogger(__name__)

RUN_NAMES = ("checkpoints/", "events/", "images/", "metrics.csv", "batches.csv", TIME_FILE)
"""Beginnings of the keys that a run writes, beside CONFIG_FILE, which it writes first."""
SPLIT = "train"
"""The split that runs train on."""
ORDER_KEYS = {
    "index_digest": "dataset (digest of its index)",
    "split": "split",
    "seed": "train.seed",
    "global_batch": "train.global_batch",
    "shuffle_window": "data.shuffle_window",
    "lanes": "data.lanes",
    "cloudy": "data.cloudy",
}
"""What the user calls each field of `OrderState`."""


@contextlib.contextmanager
def claimed(run: RunFolder, world: World) -> Iterator[Lock | None]:
    """Hold the lock of a run folder, on rank 0 for all ranks; all ranks call it together.

    Yields:
        The lock on rank 0, None on the others.

    Raises:
        UserError: On every rank, if another job writes to the run folder, it cannot be written to, or files of other
            programs are where the run's will be.
    """
    with contextlib.ExitStack() as stack:
        lock, refusal = None, None
        if world.is_main:
            try:
                lock = stack.enter_context(Lock(run.storage, "train"))
                _refuse_foreign(run.storage)
                if aborted := run.storage.abort_uploads(lambda key: key.startswith(RUN_NAMES)):
                    logger.info("removed the parts of killed uploads: %d", len(aborted))
            except UserError as error:
                refusal = error
        refusal = world.gather_objects(refusal)[0]
        if refusal is not None:
            raise refusal
        yield lock


def _refuse_foreign(storage: Storage) -> None:
    """Refuse a place that has files under a run's names, and neither a record of a run nor a checkpoint."""
    # A checkpoint holds the configuration too, with which `find_checkpoint` compares this run's.
    if storage.exists(CONFIG_FILE) or complete_checkpoints(storage, "step"):
        return
    found = next((item.key for name in RUN_NAMES for item in storage.list(name)), None)
    if found is not None:
        raise UserError(
            f"output.uri = {storage.uri!r} holds {found!r}, and neither a {CONFIG_FILE} nor a complete checkpoint that"
            f" would say which run it is of: nothing was changed; put the run's {CONFIG_FILE} back to resume it, move"
            " these files away, or name another output.uri"
        )


def find_checkpoint(run: RunFolder, config: RunConfig, dataset: ChipDataset, world: World) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None; all ranks call it together.

    Raises:
        UserError: The run folder holds another run, or is not shared by all nodes.
    """
    checkpoint = newest_checkpoint(run.storage)
    name = checkpoint.name if checkpoint else None
    if set(world.gather_objects(name)) != {name}:
        raise UserError(
            f"ranks see different checkpoints in {run.storage.uri}: the run folder must be shared by all nodes;"
            " use s3:// or a network file system"
        )
    if checkpoint:
        before: tuple[RunConfig, str] | None = checkpoint.config, checkpoint.position.index_digest
    else:
        before = _recorded(run.storage)  # A run killed before its first checkpoint is also a run.
    if before:
        _refuse_another_run(run, before, (config, dataset.index.digest))
    if checkpoint:
        logger.info("resuming from %s/checkpoints/%s", run.storage.uri, name)
    return checkpoint


def refuse_mixed(storage: Storage, config: RunConfig, index_digest: str) -> None:
    """Refuse a run folder that was begun with another configuration, in whatever key, or on another dataset.

    A training that resumes may change its rate or precision (`find_checkpoint`); the figures of a run that is compared
    with others must be those of one configuration from its first step on.

    Raises:
        UserError: The record or a complete checkpoint is of another one; the keys are named with both values.
    """
    for then, digest in _origins(storage):
        found = _differences(then, config)
        if digest != index_digest:
            found["dataset (digest of its index)"] = (digest, index_digest)
        if found:
            raise UserError(
                f"{storage.uri} holds a training that was begun with another {_in_words(found)}: name another"
                " output.uri, move this folder away, or give the same configuration to resume it"
            )


def _origins(storage: Storage) -> Iterator[tuple[RunConfig, str]]:
    """Yield the configuration and the index digest of a run's record and of each complete checkpoint."""
    if recorded := _recorded(storage):
        yield recorded
    for kind in ("step", "best"):
        for step in complete_checkpoints(storage, kind):
            with contextlib.suppress(DamagedCheckpointError):  # no run resumes from it
                yield read_origin(storage, f"{kind}-{step}")


def _differences(then: RunConfig, now: RunConfig) -> dict[str, tuple[object, object]]:
    """Return both values of each key that differs, by its dotted name."""
    before, after = then.to_dict(), now.to_dict()
    return {
        f"{section}.{key}": (before[section].get(key), after[section].get(key))
        for section in after
        for key in dict.fromkeys([*before[section], *after[section]])
        if before[section].get(key) != after[section].get(key)
    }


def _in_words(found: Mapping[str, tuple[object, object]]) -> str:
    return "; ".join(f"{name} ({before}, now {after})" for name, (before, after) in found.items())


def _recorded(storage: Storage) -> tuple[RunConfig, str] | None:
    """Return the configuration and index digest recorded in a run's config.json, or None without one."""
    if not storage.exists(CONFIG_FILE):
        return None
    source = f"{storage.uri}/{CONFIG_FILE}"
    try:
        record = decode(storage.read(CONFIG_FILE), _Record)
    except ValueError as error:
        raise UserError(f"{source} is not a record of a run ({error}): name another output.uri") from None
    sections = {name: getattr(record, name) for name in record.__struct_fields__ if name != "environment"}
    return RunConfig.from_dict(sections, source), record.environment.index_digest


class _Environment(msgspec.Struct):
    """What resuming uses of the environment."""

    index_digest: Sha256


class _Record(msgspec.Struct):
    """Schema of a run's config.json."""

    model: Section
    data: Section
    loss: Section
    train: Section
    output: Section
    environment: _Environment
    alerts: Section = {}
    deepspeed: DeepSpeedKeys = {}


def _refuse_another_run(run: RunFolder, then: tuple[RunConfig, str], now: tuple[RunConfig, str]) -> None:
    (config, digest), (config_now, digest_now) = then, now
    parts: dict[str, tuple[object, object]] = {
        "model": (config.model, config_now.model),
        "loss": (config.loss, config_now.loss),
        "data.simulate": (config.data.simulate, config_now.data.simulate),
        "train.init": (config.train.init, config_now.train.init),
        "train.freeze": (config.train.freeze, config_now.train.freeze),
    }
    found = {name: values for name, values in parts.items() if values[0] != values[1]}
    order = order_state(config, digest).differences(order_state(config_now, digest_now))
    found |= {ORDER_KEYS[name]: values for name, values in order.items()}
    if found:
        raise UserError(
            f"{run.storage.uri} holds a run with another {_in_words(found)}: name another output.uri, or give the same"
            " configuration to resume"
        )


def seed_generators(checkpoint: Checkpoint | None, world: World, seed: int, step: int) -> None:
    """Seed this rank's generators: dropout draws differ between ranks, and resume exactly with the same world size."""
    if checkpoint and checkpoint.position.world_size == world.size:
        states = checkpoint.generators[world.rank]
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and world.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"])
        return
    word = random_words(1, seed, step, world.rank, "generator")[0]
    torch.manual_seed(int(word) >> 1)


def order_state(config: RunConfig, index_digest: str) -> OrderState:
    """Return the state that the order of a run's chips depends on."""
    data, train = config.data, config.train
    shuffle = data.shuffle_window, data.lanes
    return OrderState(index_digest, SPLIT, train.seed, train.global_batch, *shuffle, data.cloudy)
