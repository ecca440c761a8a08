"""RAMS: reduction of the revisits, and limits of the published form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.config import ModelConfig
from models.encoders.rams import RAMS, AttentionBlock
from models.published import load_published, to_published
from models.registry import build_model, check_config


def rams(revisits: int, bands: int = 3, published: bool = False) -> RAMS:
    torch.manual_seed(0)
    encoder = build_model(ModelConfig("rams", "none", bands, revisits, hidden=8, published=published)).encoder
    assert isinstance(encoder, RAMS)
    return encoder


def run(encoder: RAMS, bands: int = 3) -> torch.Tensor:
    lr = torch.rand(1, encoder.revisits, bands, 5, 6, generator=torch.Generator().manual_seed(1))
    return encoder(lr, torch.zeros(1, 1, 8, 8))


def idle(encoder: RAMS) -> set[str]:
    run(encoder).sum().backward()
    return {name.split(".")[0] for name, parameter in encoder.named_parameters() if parameter.grad is None}


@pytest.mark.parametrize(
    ("revisits", "reductions", "left"), [(1, 0, 1), (2, 0, 2), (3, 0, 3), (4, 1, 2), (5, 1, 3), (8, 3, 2), (9, 3, 3)]
)
def test_revisits_are_dropped_two_at_a_time_until_three_or_fewer_are_left(
    revisits: int, reductions: int, left: int
) -> None:
    encoder = rams(revisits)
    steps = []
    encoder.flatten.register_forward_pre_hook(lambda _, args: steps.append(args[0].shape[2]))
    encoder.rfab.register_forward_pre_hook(lambda _, args: steps.append(args[0].shape[2]))
    assert run(encoder).shape == (1, 8, 5, 6)
    assert steps == [revisits] * 12 + [revisits - 2 * i for i in range(reductions)] + [left]
    assert encoder.flatten.kernel_size == (left, 3, 3)


@pytest.mark.parametrize("revisits", [1, 2, 3, 4, 7])
def test_nothing_is_idle(revisits: int) -> None:
    assert idle(rams(revisits)) == set()


@pytest.mark.parametrize(
    ("revisits", "unused"),
    [
        (3, {"reduce", "idle_flatten"}),
        (4, {"idle_flatten"}),
        (5, {"idle_flatten"}),
    ],
)
def test_the_published_form_holds_both_last_convolutions(revisits: int, unused: set[str]) -> None:
    encoder = rams(revisits, published=True)
    assert idle(encoder) == unused
    kernels = {encoder.flatten.kernel_size[0], encoder.idle_flatten.kernel_size[0]}
    assert kernels == {2, 3}


@pytest.mark.parametrize("revisits", [3, 4, 7])
def test_both_forms_compute_the_same(revisits: int) -> None:
    config = ModelConfig("rams", "none", revisits=revisits, hidden=8)
    own = build_model(config)
    published = build_model(ModelConfig("rams", "none", revisits=revisits, hidden=8, published=True))
    state = to_published(published)
    last = "MISR.blockMISR.before_upsampling_Con3d_even.bias"
    used = last if revisits % 2 == 0 else last.replace("_even", "")
    assert torch.equal(state[used], published.state_dict()["encoder.flatten.bias"])
    load_published(own, state)
    lr, pan = torch.rand(2, revisits, 3, 6, 5), torch.rand(2, 1, 9, 9)
    torch.testing.assert_close(own(lr, pan).fused, published(lr, pan).fused)


def test_what_cannot_be_published_has_no_published_state() -> None:
    model = build_model(ModelConfig("rams", "none", revisits=2, hidden=8))
    with pytest.raises(ValueError, match="published RAMS cannot take revisits = 2"):
        to_published(model)


@pytest.mark.parametrize(("channels", "squeezed"), [(1, 1), (6, 1), (15, 1), (16, 2), (24, 3), (32, 4)])
def test_attention_has_an_eighth_of_the_channels_and_at_least_one(channels: int, squeezed: int) -> None:
    assert AttentionBlock(nn.Conv2d, channels).squeeze.out_channels == squeezed


def test_attention_weighs_whole_channels() -> None:
    block = AttentionBlock(nn.Conv3d, 4)
    x = torch.rand(2, 4, 3, 5, 6)
    u = block.conv2(block.conv1(x).relu())
    weight = (block(x) - x) / u
    assert ((weight > 0) & (weight < 1)).all()
    torch.testing.assert_close(weight, weight[:, :, :1, :1, :1].expand_as(weight), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("bands", "revisits", "message"),
    [
        (4, 8, "published RAMS is written for 3 bands and cannot take bands = 4; with published = false"),
        (3, 2, "published RAMS cannot take revisits = 2: .* with published = false"),
        (3, 1, "published RAMS cannot take revisits = 1"),
    ],
)
def test_the_published_limits(bands: int, revisits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(ModelConfig("rams", "none", bands, revisits, published=True))
    assert run(rams(revisits, bands), bands).isfinite().all()


def test_other_inputs_than_it_was_built_for_are_refused() -> None:
    model = build_model(ModelConfig("rams", "none", revisits=3, hidden=8))
    with pytest.raises(ValueError, match="built for 3 revisits and was given 4: build it with revisits = 4"):
        model(torch.rand(1, 4, 3, 5, 5), torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="RAMS needs revisits of at least 2 x 2 px, and these are 1 x 5"):
        model(torch.rand(1, 3, 3, 1, 5), torch.rand(1, 1, 8, 8))
