"""Checkpoints in the run folder: complete only with their marker, equal for any world size and ZeRO stage.

``checkpoints/step-<n>/`` holds everything that training needs to resume; ``checkpoints/best-<n>/`` the weights with the
least validation loss. Each holds ``state.pt`` (tensors and plain values alone), ``checkpoint.json`` and,
written last, the marker ``COMPLETE`` with the size and SHA-256 of both. A checkpoint is data: nothing in it is
executed, and it is compared with its own configuration before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from models.registry import build_model
from models.tensor_file import read_tensors
from pipeline.config import RunConfig, Sections
from pipeline.engines.engine import MOMENTS, TrainState, trained
from sharding.errors import UserError
from sharding.schema import Natural, Positive, Sha256, decode
from sharding.storage import NotFoundError, Storage

T = TypeVar("T")

logger = logging.getLogger(__name__)

MARKER = "COMPLETE"
STATE = "state.pt"
META = "checkpoint.json"
FORMAT_VERSION = 1


class DamagedCheckpointError(UserError):
    """A checkpoint's bytes do not match its marker."""


@dataclass(frozen=True)
class Position:
    """Position of the training at a checkpoint."""

    step: Natural
    """Optimizer steps taken; global batches 1 to ``step`` are consumed."""
    best_loss: Annotated[float, Meta(ge=-1e300, le=1e300)] | None
    """Least validation loss so far."""
    index_digest: Sha256
    """Digest of the dataset's index."""
    world_size: Positive
    """Number of ranks that trained; their generator states fit this number only."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back."""

    name: str
    """Folder name, ``step-<n>`` or ``best-<n>``."""
    config: RunConfig
    """The run's resolved configuration."""
    position: Position
    """Position of the training."""
    state: TrainState
    """Weights, and moments unless it holds only the best weights."""
    generators: list[dict[str, Tensor]]
    """Each rank's random generator states, by device type."""


def save_checkpoint(
    runs: Storage,
    name: str,
    config: RunConfig,
    position: Position,
    state: TrainState,
    generators: list[dict[str, Tensor]],
) -> None:
    """Publish ``checkpoints/<name>/``, its marker last; during an overwrite it has no marker.

    Args:
        runs: The run folder.
        name: ``step-<n>`` or ``best-<n>``.
        config: The run's resolved configuration.
        position: Position of the training.
        state: Weights and, unless ``best``, moments.
        generators: Each rank's generator states.
    """
    state.wait()
    folder = runs.child(f"checkpoints/{name}")
    content = {"weights": state.weights, "moments": state.moments, "generators": generators, "ema": state.ema}
    meta = {"format_version": FORMAT_VERSION, "config": config.to_dict(), "position": asdict(position)}
    text = json.dumps(meta, indent=1).encode()
    with _saved(content) as saved:
        with saved.open("rb") as file:
            state_digest = hashlib.file_digest(file, "sha256").hexdigest()
        marker = {
            STATE: {"bytes": saved.stat().st_size, "sha256": state_digest},
            META: {"bytes": len(text), "sha256": _sha256(text)},
        }
        folder.delete(MARKER)
        folder.upload(STATE, saved)
    folder.write(META, text)
    folder.write(MARKER, json.dumps(marker, indent=1).encode())


@contextlib.contextmanager
def _saved(content: Mapping[str, object]) -> Iterator[Path]:
    """Write ``torch.save``'s bytes to a file in memory, which is there as long as the block lasts.

    Into a Python buffer ``torch.save`` would hold the interpreter's lock, and with it the step that is being taken. The
    file is sent as it is: each more copy of it takes new memory, for which the step waits too.
    """
    number = os.memfd_create(STATE)
    try:
        path = Path(f"/proc/self/fd/{number}")
        torch.save(content, path)
        yield path
    finally:
        os.close(number)


def complete_checkpoints(runs: Storage, kind: str) -> list[int]:
    """Return the steps of the complete checkpoints of ``kind`` (``step`` or ``best``), ascending."""
    pattern = re.compile(rf"{kind}-(\d+)/{MARKER}$")
    keys = (stored.key for stored in runs.child("checkpoints").list())
    return sorted(int(match[1]) for match in map(pattern.match, keys) if match)


def prune_checkpoints(runs: Storage, kind: str, newest: int, keep: int) -> None:
    """Remove checkpoints of ``kind`` and remains of incomplete ones, except ``newest`` and the ``keep - 1`` before it.

    A checkpoint after ``newest`` was left by a process that got further before it was killed, and is stale too.
    """
    before = [step for step in complete_checkpoints(runs, kind) if step < newest]
    kept = {newest, *before[len(before) - (keep - 1) :]} if keep > 1 else {newest}
    folder = runs.child("checkpoints")
    stale = [
        stored.key
        for stored in folder.list()
        if (match := re.match(rf"{kind}-(\d+)/", stored.key)) and int(match[1]) not in kept
    ]
    # The marker is deleted first: a partly removed checkpoint must not look complete.
    for key in sorted(stale, key=lambda key: not key.endswith(MARKER)):
        folder.delete(key)


def discard_diverged(runs: Storage, step: int) -> None:
    """Make the full checkpoint of ``step`` incomplete, so that no run resumes from it; do nothing if it is absent.

    The last one is kept, with a warning: a run with checkpoints never starts over automatically.
    """
    name = f"step-{step}"
    if complete_checkpoints(runs, "step") == [step]:
        logger.warning(
            "%s/checkpoints/%s is kept, since no other full checkpoint is left, but a run that resumes from it may"
            " diverge again: to start over, name another output.uri, with train.init to begin with the best weights",
            runs.uri,
            name,
        )
        return
    runs.child(f"checkpoints/{name}").delete(MARKER)


def best_kept(runs: Storage, checkpoint: Checkpoint | None) -> tuple[float | None, int | None]:
    """Return the validation loss and the step of the best weights, which stay until better ones are found.

    If they are damaged, return the loss that the checkpoint recorded, and no step. A run that was killed before its
    first full checkpoint starts over; it may have best weights all the same.
    """
    steps = complete_checkpoints(runs, "best")
    if not steps:
        return None, None
    try:
        best = read_checkpoint(runs, f"best-{steps[-1]}").position.best_loss
    except DamagedCheckpointError as error:
        logger.warning("%s", error)
        return checkpoint.position.best_loss if checkpoint else None, None
    if checkpoint is None:
        logger.warning(
            "%s has no full checkpoint: training starts at step 0, and the best weights, of step %d, stay until"
            " better ones are found",
            runs.uri,
            steps[-1],
        )
    return best, steps[-1]


def read_origin(runs: Storage, name: str) -> tuple[RunConfig, str]:
    """Return the configuration and the index digest of ``checkpoints/<name>/``, without its state.

    Raises:
        DamagedCheckpointError: They cannot be read; `read_checkpoint` refuses such a checkpoint too.
        UserError: The configuration is none of this version, or the store does not answer.
    """
    folder = runs.child(f"checkpoints/{name}")
    try:
        meta = _decode(folder, META, folder.read(META), _Meta)
    except NotFoundError:
        raise _damaged(folder, META, "it is missing") from None
    return RunConfig.from_dict(meta.config, source=f"{folder.uri}/{META}"), meta.position.index_digest


def read_checkpoint(runs: Storage, name: str) -> Checkpoint:
    """Read ``checkpoints/<name>/`` and check it against its marker and its configuration.

    Raises:
        DamagedCheckpointError: Its bytes are not the marker's, or are no state of its configuration.
        UserError: The checkpoint is absent, incomplete or of another format, or the store does not answer.
    """
    folder = runs.child(f"checkpoints/{name}")
    if not folder.exists(MARKER):
        raise UserError(f"{folder.uri} is not a complete checkpoint: it has no {MARKER} marker")
    files = _read_files(folder)
    version = _decode(folder, META, files[META], _Version).format_version
    if version != FORMAT_VERSION:
        raise UserError(f"{folder.uri} has checkpoint format {version}, this version reads {FORMAT_VERSION}")
    meta = _decode(folder, META, files[META], _Meta)
    if not name.endswith(f"-{meta.position.step}"):
        raise _damaged(folder, META, f"position.step: {meta.position.step} is another step's")
    config = RunConfig.from_dict(meta.config, source=f"{folder.uri}/{META}")
    try:
        state, generators = _state(files[STATE], config, meta.position, full=not name.startswith("best-"))
    except ValueError as error:
        raise _damaged(folder, STATE, f"it {error}") from None
    return Checkpoint(name, config, meta.position, state, generators)


def _read_files(folder: Storage) -> dict[str, bytes]:
    """Return the content of a checkpoint's files, which is that of its marker."""
    marker = _decode(folder, MARKER, folder.read(MARKER), dict[str, _Written])
    files: dict[str, bytes] = {}
    for file in (STATE, META):
        try:
            files[file] = folder.read(file)
        except NotFoundError:
            files[file] = b""
        if file not in marker or marker[file].sha256 != _sha256(files[file]):
            raise _damaged(folder, file, "its SHA-256 is not the marker's")
    return files


def _state(
    data: bytes, config: RunConfig, position: Position, *, full: bool
) -> tuple[TrainState, list[dict[str, Tensor]]]:
    """Return the state and the generators in a file, compared with those of a network of this configuration.

    Raises:
        ValueError: If they are others, or hold a value that is not finite; the message completes "it ...".
    """
    content = read_tensors(data)
    # Checkpoints of earlier versions hold no average.
    if not isinstance(content, dict) or content.keys() | {"ema"} != {"weights", "moments", "generators", "ema"}:
        raise ValueError("holds no weights, moments and generators")
    with torch.device("meta"):
        network = build_model(config.model)
    if config.train.freeze:
        network.freeze(config.train.freeze)
    parameters = dict(network.named_parameters())
    _refuse_others("weights", content["weights"], {**dict(network.named_buffers()), **parameters})
    moments = content["moments"]
    if not isinstance(moments, dict) or moments.keys() != (dict(trained(network)).keys() if full else set()):
        raise ValueError("holds moments of other parameters than its configuration has")
    for name, values in moments.items():
        _refuse_others(f"moments of {name}", values, dict.fromkeys(MOMENTS, parameters[name]))
    average = content.get("ema", {})
    if average != {}:
        _refuse_others("averaged weights", average, parameters)
    generators = content["generators"]
    _refuse_generators(generators, position.world_size)
    try:
        network.load_state_dict(content["weights"], assign=True)  # into a network without memory
    except ValueError as error:  # a stage refuses a value
        raise ValueError(f"holds weights of which {error}") from None
    return TrainState(content["weights"], moments, position.step, average), generators


def _refuse_others(what: str, given: object, wanted: Mapping[str, Tensor]) -> None:
    """Refuse tensors of other names, shapes or types, and values that are not finite."""
    if not isinstance(given, dict) or given.keys() != wanted.keys():
        names = given.keys() if isinstance(given, dict) else set()
        other = sorted(map(str, names ^ wanted.keys()))
        raise ValueError(f"holds {what} of other names than its configuration has ({', '.join(other[:3])[:200]!r})")
    for name, value in wanted.items():
        there = given[name]
        if not isinstance(there, Tensor) or (there.shape, there.dtype) != (value.shape, value.dtype):
            found = f"{there.dtype} {list(there.shape)}" if isinstance(there, Tensor) else "no tensor"
            raise ValueError(f"holds {what}: {name} is {found} where {value.dtype} {list(value.shape)} is needed")
        if not there.isfinite().all():
            raise ValueError(f"holds {what}: {name} has values that are not finite")


def _refuse_generators(generators: object, world_size: int) -> None:
    """Refuse anything but the generator states of each rank, by device type."""
    if not isinstance(generators, list) or len(generators) != world_size:
        raise ValueError(f"holds no generator states of {world_size} ranks")
    for states in generators:
        if not isinstance(states, dict) or not {"cpu"} <= states.keys() <= {"cpu", "cuda"}:
            raise ValueError("holds generator states of unknown devices")
        for state in states.values():
            if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
                raise ValueError("holds generator states that are none")
        try:
            torch.Generator().set_state(states["cpu"])
        except RuntimeError:
            raise ValueError("holds generator states that are none") from None


def select_checkpoint(runs: Storage, which: str) -> str:
    """Return the folder name of ``best``, ``last`` or a step's checkpoint.

    Raises:
        UserError: No such checkpoint; the message lists the complete ones.
    """
    steps, best = complete_checkpoints(runs, "step"), complete_checkpoints(runs, "best")
    if which == "best" and best:
        return f"best-{best[-1]}"
    if which == "last" and steps:
        return f"step-{steps[-1]}"
    if which.isdecimal() and int(which) in steps:
        return f"step-{which}"
    there = ", ".join([*(f"best (step {step})" for step in best[-1:]), *map(str, steps)]) or "none yet"
    raise UserError(f"{runs.uri} has no checkpoint {which!r}: complete ones are {there}")


def newest_checkpoint(runs: Storage) -> Checkpoint | None:
    """Return the newest full checkpoint whose bytes are intact, or None if none was ever completed.

    Raises:
        UserError: The store does not answer, the format is another version's, or every checkpoint is damaged: a run
            with checkpoints never starts over automatically.
    """
    steps = complete_checkpoints(runs, "step")
    for step in reversed(steps):
        try:
            return read_checkpoint(runs, f"step-{step}")
        except DamagedCheckpointError as error:
            logger.warning("%s; trying the previous checkpoint", error)
    if steps:
        raise UserError(f"every checkpoint in {runs.uri} is damaged: name another output.uri to start over")
    return None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Written(msgspec.Struct):
    """Schema of a file in the marker."""

    sha256: Sha256
    bytes: Natural


class _Version(msgspec.Struct):
    format_version: int


class _Meta(msgspec.Struct):
    """Schema of `META`."""

    config: Sections
    position: Position


def _decode(folder: Storage, name: str, data: bytes, kind: type[T]) -> T:
    try:
        return decode(data, kind)
    except ValueError as error:
        raise _damaged(folder, name, str(error)) from None


def _damaged(folder: Storage, name: str, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{folder.uri}/{name} is damaged ({what}): use another checkpoint")
