"""Checkpoints in the run folder: complete only with their marker, equal for any world size and ZeRO stage.

``checkpoints/step-<n>/`` holds everything that training needs to resume; ``checkpoints/best-<n>/`` the weights with the
least validation loss. Each holds ``state.pt`` (tensors alone, read with ``weights_only``), ``checkpoint.json`` and,
written last, the marker ``COMPLETE`` with the size and SHA-256 of both.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.engines.engine import TrainState
from sharding.errors import UserError
from sharding.storage import NotFoundError, Storage

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

    step: int
    """Optimizer steps taken; global batches 1 to ``step`` are consumed."""
    best_loss: float | None
    """Least validation loss so far."""
    index_digest: str
    """Digest of the dataset's index."""
    world_size: int
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
    folder = runs.child(f"checkpoints/{name}")
    buffer = io.BytesIO()
    torch.save(
        {"weights": state.weights, "moments": state.moments, "generators": generators, "ema": state.ema},
        buffer,
    )
    meta = {"format_version": FORMAT_VERSION, "config": config.to_dict(), "position": asdict(position)}
    files = {STATE: buffer.getvalue(), META: json.dumps(meta, indent=1).encode()}
    folder.delete(MARKER)
    for file, data in files.items():
        folder.write(file, data)
    marker = {file: {"bytes": len(data), "sha256": _sha256(data)} for file, data in files.items()}
    folder.write(MARKER, json.dumps(marker, indent=1).encode())


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


def discard_checkpoint(runs: Storage, name: str) -> None:
    """Make ``checkpoints/<name>/`` incomplete, so that no run resumes from it; do nothing if it is absent."""
    runs.child(f"checkpoints/{name}").delete(MARKER)


def best_loss(runs: Storage, checkpoint: Checkpoint) -> float | None:
    """Return the validation loss of the best weights; if they are damaged, the value recorded by the checkpoint."""
    steps = complete_checkpoints(runs, "best")
    try:
        return read_checkpoint(runs, f"best-{steps[-1]}").position.best_loss if steps else None
    except DamagedCheckpointError as error:
        logger.warning("%s", error)
        return checkpoint.position.best_loss


def read_checkpoint(runs: Storage, name: str) -> Checkpoint:
    """Read ``checkpoints/<name>/`` and check it against its marker.

    Raises:
        DamagedCheckpointError: Its bytes are not the marker's.
        UserError: The checkpoint is absent, incomplete or of another format, or the store does not answer.
    """
    folder = runs.child(f"checkpoints/{name}")
    if not folder.exists(MARKER):
        raise UserError(f"{folder.uri} is not a complete checkpoint: it has no {MARKER} marker")
    marker = _parse(folder, MARKER, folder.read(MARKER))
    files: dict[str, bytes] = {}
    for file in (STATE, META):
        try:
            files[file] = folder.read(file)
        except NotFoundError:
            files[file] = b""
        if marker.get(file, {}).get("sha256") != _sha256(files[file]):
            raise DamagedCheckpointError(
                f"{folder.uri}/{file} is damaged: its SHA-256 is not the marker's; use another checkpoint"
            )
    meta = _parse(folder, META, files[META])
    if meta.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder.uri} has checkpoint format {meta.get('format_version')}, this version reads {FORMAT_VERSION}"
        )
    config = RunConfig.from_dict(meta["config"], source=f"{folder.uri}/{META}")
    position = Position(**meta["position"])
    tensors = torch.load(io.BytesIO(files[STATE]), map_location="cpu", weights_only=True)
    # Checkpoints of earlier versions hold no average.
    state = TrainState(tensors["weights"], tensors["moments"], position.step, tensors.get("ema", {}))
    return Checkpoint(name, config, position, state, tensors["generators"])


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


def _parse(folder: Storage, name: str, data: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise DamagedCheckpointError(f"{folder.uri}/{name} is damaged: it is not a JSON object; use another checkpoint")
    return value
