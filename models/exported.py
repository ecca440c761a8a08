"""Exported models: a folder with weights and configuration that loads with torch, safetensors and this package alone.

The folder holds ``model.safetensors`` (the state dict) and ``model.json``: configuration, optimizer steps taken, the
SHA-256 of the weights file, and facts about the training that a user needs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from models.config import ModelConfig
from models.registry import build_model
from models.satfusion import SatFusion

WEIGHTS, FACTS = "model.safetensors", "model.json"
FORMAT_VERSION = 1


def to_exported(network: SatFusion, step: int, facts: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the content of both files, ``WEIGHTS`` and ``FACTS``; equal arguments give equal bytes.

    Args:
        network: The network with its weights.
        step: Optimizer steps that it was trained for.
        facts: Anything else that ``FACTS`` is to hold, for JSON.
    """
    state = {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}
    weights = safetensors.save(state)
    table = {
        "format_version": FORMAT_VERSION,
        "model": dataclasses.asdict(network.config),
        "step": step,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "facts": dict(facts),
    }
    return {WEIGHTS: weights, FACTS: (json.dumps(table, indent=1) + "\n").encode()}


def load_exported(folder: str | Path) -> SatFusion:
    """Return the network of a folder that ``satfusion export`` wrote, on the CPU, in evaluation mode.

    Raises:
        ValueError: A file is missing, damaged, of another version, or does not fit the other one; nothing in them is
            executed.
    """
    folder = Path(folder)
    files = {}
    for name in (FACTS, WEIGHTS):
        try:
            files[name] = (folder / name).read_bytes()
        except OSError as error:
            raise ValueError(f"{folder / name} cannot be read: {error.strerror}") from None
    config, step, digest = _read_facts(folder / FACTS, files[FACTS])
    if hashlib.sha256(files[WEIGHTS]).hexdigest() != digest:
        raise ValueError(f"{folder / WEIGHTS} is not the file that {FACTS} describes: copy or export both again")
    try:
        state = safetensors.load(files[WEIGHTS])
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}): export it again") from None
    _check_shapes(folder, config, state)
    network = build_model(config)
    network.load_state_dict(state)
    network.at_step(step)
    return network.eval()


def _read_facts(path: Path, content: bytes) -> tuple[ModelConfig, int, str]:
    try:
        table = json.loads(content)
        if table["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format version is {table['format_version']!r}, this program reads {FORMAT_VERSION}")
        kinds = {field.name: type(field.default) for field in dataclasses.fields(ModelConfig)}
        for name, value in table["model"].items():
            if type(value) is not kinds[name]:
                raise ValueError(f"{name} = {value!r} is no {kinds[name].__name__}")
        return ModelConfig(**table["model"]), int(table["step"]), str(table["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not the configuration of an exported model ({error}): export it again") from None


def _check_shapes(folder: Path, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Compare names and shapes before memory is allocated for a configuration that no weights belong to."""
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in build_model(config).state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    if wanted != given:
        name = next(iter(sorted(wanted.items() ^ given.items())))[0]
        raise ValueError(
            f"{folder / WEIGHTS} holds {name} as {given.get(name)}, and {FACTS} needs {wanted.get(name)}: export again"
        )
