"""State dicts of the published SatFusion, in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from models.contracts import NamePairs
from models.satfusion import SatFusion

PREFIX = "backbone."
"""What a published training checkpoint puts before the model's names."""

REGISTRATION = "shifter."
"""Constants of the published loss that the same checkpoint holds; no part of the model."""


def to_published(model: SatFusion) -> dict[str, Tensor]:
    """Return the model's state under all published names, in their order, second names included."""
    state = model.state_dict()
    return {theirs: state[own] for theirs, own in _names(model)}


def load_published(model: SatFusion, state: Mapping[str, Tensor]) -> None:
    """Fill ``model`` from a published state dict.

    Names may be bare or begin with ``backbone.``. Where copies of one tensor differ, the last name in the
    published order wins.

    Raises:
        ValueError: If a name is missing or left over, or a shape is not the model's; nothing is then loaded.
    """
    given = {name.removeprefix(PREFIX): value for name, value in state.items() if not name.startswith(REGISTRATION)}
    names = _names(model)
    known = {theirs for theirs, _ in names}
    _refuse("lacks", [theirs for theirs, _ in names if theirs not in given])
    _refuse("holds, beyond what this model has,", [name for name in given if name not in known])
    own = model.state_dict()
    for theirs, ours in names:
        if given[theirs].shape != own[ours].shape:
            raise ValueError(
                f"the published state dict has {theirs} of shape {list(given[theirs].shape)} where this "
                f"model needs {list(own[ours].shape)}"
            )
    model.load_state_dict({ours: given[theirs] for theirs, ours in names})


def _refuse(verb: str, names: Sequence[str]) -> None:
    if names:
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"the published state dict {verb} {', '.join(names[:3])}{rest}")


def _names(model: SatFusion) -> list[tuple[str, str]]:
    """Return (published name, own name) of every entry of the state dict, in the published order."""
    own = list(model.state_dict())
    names = []
    for theirs, ours in _prefixes(model):
        for name in own:
            if name.startswith(f"{ours}."):
                names.append((theirs + name.removeprefix(ours), name))
    assert {ours for _, ours in names} == set(own), "a model's published_names leave some of its state out"
    return names


def _prefixes(model: SatFusion) -> NamePairs:
    pairs: NamePairs = ()
    if model.encoder is not None:
        pairs += _below("MISR", "encoder", model.encoder.published_names())
    upsampler = (("1", "conv1"), ("3", "act1"), ("4", "conv2"), ("6", "act2"))
    pairs += _below("MISR.sr.upsample", "upsampler", upsampler)
    if model.head is not None:
        pairs += _below("Sharpening.blockSharp", "head", model.head.published_names())
    return pairs + _below("color_correct.conv", "refinement", (("0", "conv1"), ("2", "conv2")))


def _below(theirs: str, ours: str, pairs: NamePairs) -> NamePairs:
    """Put a prefix before each side; an empty name stands for the prefix itself."""
    return tuple((f"{theirs}.{a}".rstrip("."), f"{ours}.{b}".rstrip(".")) for a, b in pairs)
