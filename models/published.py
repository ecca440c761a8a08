"""State dicts of the published SatFusion, in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.contracts import NamePairs, under
from models.registry import all_pairs, build_model
from models.satfusion import SatFusion
from models.tensor_file import read_tensors

PREFIXES = ("backbone.", "module.", "_orig_mod.", "model.")
"""Prefixes that training checkpoints put before the model's names, also several at once: of the published module, of
DistributedDataParallel, of torch.compile, and of wrappers."""

BARE, PREFIXED = "backbone_state_dict", "state_dict"
"""Keys of the state dict in such a checkpoint, without the prefix and with it."""

REGISTRATION = "shifter."
"""Constants of the published loss in the same checkpoint, which are not part of the model."""

_LEVEL = re.compile(r"MISR\.blockMISR\.fusion\.([0-9]+)\.")
"""Names of HighRes-net's fusion, which is registered once for each level."""

SETTING = "reserved_NXY"
"""Last part of the name of each pair of integers that the published ARConv keeps as a parameter."""


def to_published(model: SatFusion) -> dict[str, Tensor]:
    """Return the model's state under all published names, in their order, second names included.

    Unused entries of the published model are zero if ``model`` was built without them.

    Raises:
        ValueError: If the published model does not support the configuration of ``model``.
    """
    state = model.state_dict()
    idle = {theirs: torch.zeros(value.shape, dtype=value.dtype) for theirs, value in _idle(model).items()}
    own = dict(_names(model))
    return {theirs: idle[theirs] if theirs in idle else state[own[theirs]] for theirs, _ in _names(_twin(model))}


def load_published(model: SatFusion, state: Mapping[str, Tensor]) -> None:
    """Fill ``model`` from a published state dict.

    Names may be bare or begin with ``PREFIXES``. If copies of one tensor differ, the last name in the published order
    wins. Entries that the published model never uses are skipped if ``model`` was built without them.

    Raises:
        ValueError: If a name is missing or unexpected, a shape differs from the model's, or a value is not finite;
            nothing is then loaded.
    """
    given = _bare(state)
    names = _names(model)
    idle = _idle(model)
    known = {**dict(names), **idle}
    _refuse("lacks", [theirs for theirs in known if theirs not in given])
    _refuse("holds, beyond what this model has,", [name for name in given if name not in known])
    own = model.state_dict()
    for theirs, ours in names:
        if given[theirs].shape != own[ours].shape:
            raise ValueError(
                f"the published state dict has {theirs} of shape {list(given[theirs].shape)} where this "
                f"model needs {list(own[ours].shape)}"
            )
    _refuse("has values that are not finite in", [name for name in known if not given[name].isfinite().all()])
    before = {name: value.clone() for name, value in own.items()}
    try:
        model.load_state_dict({ours: given[theirs] for theirs, ours in names})
    except ValueError:  # a stage refuses a value, after others have loaded theirs
        model.load_state_dict(before)
        raise


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters by the published way of counting.

    Integer settings that the published ARConv keeps among its parameters count too; here they are buffers, which
    optimizers and ZeRO stages do not change.
    """
    settings = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith(SETTING))
    return settings + sum(parameter.numel() for parameter in model.parameters())


def _refuse(verb: str, names: Sequence[str]) -> None:
    if names:
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"the published state dict {verb} {', '.join(names[:3])}{rest}")


def read_published(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of a published checkpoint; nothing in the file is executed or imported.

    The file holds the state dict itself, or it under ``backbone_state_dict`` or ``state_dict`` as Lightning writes it,
    whatever else is pickled beside it.

    Raises:
        ValueError: If the file does not exist, is not PyTorch's, or holds no state dict.
    """
    try:
        content = read_tensors(Path(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    if isinstance(content, dict):
        content = content.get(BARE, content.get(PREFIXED, content))
    tensors = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )
    if not content or not tensors:
        raise ValueError(f"{path} holds no state dict, neither bare nor under {BARE} or {PREFIXED}")
    return cast(dict[str, Tensor], content)


def identify(state: Mapping[str, Tensor], config: ModelConfig) -> ModelConfig | None:
    """Return the configuration whose published form has just the names of ``state``.

    Encoder and head are recovered, and for HighRes-net the number of revisits, as far as the names tell: the largest
    one with the same number of levels, unless that of ``config`` has it too.

    Args:
        state: A published state dict.
        config: All other options.
    """
    try:
        given = set(_bare(state))
    except ValueError:
        return None
    levels = len({match[1] for match in map(_LEVEL.match, given) if match})
    for encoder, head in all_pairs():
        for revisits in dict.fromkeys((config.revisits, 2**levels)):
            try:
                found = replace(config, encoder=encoder, head=head, revisits=revisits, published=True)
                with torch.device("meta"):
                    model = build_model(found)
            except ValueError:
                continue
            if {theirs for theirs, _ in _names(model)} == given:
                return found
    return None


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of the model by their names without prefixes.

    Raises:
        ValueError: If two entries have the same name without prefixes.
    """
    bare: dict[str, Tensor] = {}
    for name, value in state.items():
        short = name
        while prefix := next((prefix for prefix in PREFIXES if short.startswith(prefix)), ""):
            short = short.removeprefix(prefix)
        if short.startswith(REGISTRATION):
            continue
        if short in bare:
            raise ValueError(f"the published state dict has {short} twice, with different prefixes")
        bare[short] = value
    return bare


def _twin(model: SatFusion) -> SatFusion:
    """Return the published form of ``model``, names and shapes only."""
    if model.config.published:
        return model
    with torch.device("meta"):
        return build_model(replace(model.config, published=True))


def _idle(model: SatFusion) -> dict[str, Tensor]:
    """Return the entries that only the published form of ``model`` holds, by published name."""
    twin = _twin(model)
    state = twin.state_dict()
    own = dict(_names(model))
    return {theirs: state[ours] for theirs, ours in _names(twin) if theirs not in own}


def _names(model: SatFusion) -> list[tuple[str, str]]:
    """Return (published name, own name) of every entry of the state dict, in the published order."""
    own = list(model.state_dict())
    names = []
    for theirs, ours in _prefixes(model):
        for name in own:
            if name == ours or name.startswith(f"{ours}."):
                names.append((theirs + name.removeprefix(ours), name))
    assert {ours for _, ours in names} == set(own), "a model's published_names leave some of its state out"
    return names


def _prefixes(model: SatFusion) -> NamePairs:
    pairs: NamePairs = ()
    if model.encoder is not None:
        pairs += under("MISR", "encoder", *model.encoder.published_names())
    upsampler = (("1", "conv1"), ("3", "act1"), ("4", "conv2"), ("6", "act2"))
    if model.upsampler is not None:
        pairs += under("MISR.sr.upsample", "upsampler", *upsampler)
    if model.head is not None:
        pairs += under("Sharpening.blockSharp", "head", *model.head.published_names())
    if model.refinement is not None:
        pairs += under("color_correct.conv", "refinement", ("0", "conv1"), ("2", "conv2"))
    return pairs
