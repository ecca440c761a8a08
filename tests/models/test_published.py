"""Published state dicts are read and written whole, or refused."""

from __future__ import annotations

import pytest
import torch

from models.published import load_published, to_published
from models.registry import ModelConfig, build_model

SMALL = ModelConfig("highresnet", "pannet", bands=2, revisits=5, hidden=8)


def test_round_trip_through_a_training_checkpoint() -> None:
    source, copy = build_model(SMALL), build_model(SMALL)
    state = {f"backbone.{name}": value for name, value in to_published(source).items()}
    state |= {
        "shifter.conv2d_shift.weight": torch.ones(81, 1, 11, 11),
        "shifter.shift_kernels": torch.ones(1),
    }
    load_published(copy, state)
    for name, value in source.state_dict().items():
        assert torch.equal(copy.state_dict()[name], value), name


@pytest.mark.parametrize("revisits", [1, 2, 3, 6, 9])
def test_one_copy_of_the_fusion_a_level(revisits: int) -> None:
    model = build_model(ModelConfig("highresnet", "none", revisits=revisits, hidden=4))
    levels = {name.split(".")[3] for name in to_published(model) if ".fusion." in name}
    assert len(levels) == {1: 0, 2: 1, 3: 2, 6: 3, 9: 4}[revisits]


def test_missing_and_left_over_names_are_named() -> None:
    model = build_model(SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: torch.zeros_like(value) for name, value in to_published(model).items()}
    with pytest.raises(ValueError, match=r"lacks MISR\.sr\.upsample\.3\.weight"):
        load_published(model, {k: v for k, v in state.items() if k != "MISR.sr.upsample.3.weight"})
    with pytest.raises(ValueError, match=r"beyond what this model has, MISR\.extra"):
        load_published(model, state | {"MISR.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"upsample\.1\.bias of shape \[3\] where this model needs \[2\]"):
        load_published(model, state | {"MISR.sr.upsample.1.bias": torch.zeros(3)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
